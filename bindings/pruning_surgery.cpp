#include <rarefy/pruning/surgery.h>

#include <memory>

#include "bindings.h"

namespace rarefy::python {
namespace {

using namespace rarefy::pruning;

using Names = std::vector<std::string>;
using Tensors = std::vector<at::Tensor>;

std::unique_ptr<Surgery> make_surgery(const Names& names, const Tensors& values, const Names& parameters,
                                      const Names& state_names, const Tensors& state) {
  std::vector<graph::NamedTensor> tensors;
  for (size_t i = 0; i < names.size(); ++i) {
    tensors.push_back({names[i], values.at(i)});
  }
  std::vector<OptimizerTensor> of_optimizers;
  for (size_t i = 0; i < parameters.size(); ++i) {
    of_optimizers.push_back({parameters[i], state_names.at(i), state.at(i)});
  }
  return std::make_unique<Surgery>(std::move(tensors), std::move(of_optimizers));
}

}  // namespace

void init_pruning_surgery(py::module_& parent) {
  auto m = parent.def_submodule("pruning");

  py::class_<Cut>(m, "Cut", "The slices of one dimension of one tensor that stay, ascending.")
      .def(py::init([](std::string tensor, int64_t dim, std::vector<int64_t> kept) {
             return Cut{std::move(tensor), dim, std::move(kept)};
           }),
           py::arg("tensor"), py::arg("dim"), py::arg("kept"))
      .def_readonly("tensor", &Cut::tensor)
      .def_readonly("dim", &Cut::dim)
      .def_readonly("kept", &Cut::kept)
      .def("__repr__", [](const Cut& self) {
        return "Cut(tensor='" + self.tensor + "', dim=" + std::to_string(self.dim) + ", " +
               std::to_string(self.kept.size()) + " kept)";
      });

  py::class_<Surgery>(m, "Surgery", "The removal of slices from tensors, as a transaction.")
      .def(py::init(&make_surgery), py::arg("names"), py::arg("values"), py::arg("state_parameters"),
           py::arg("state_names"), py::arg("state"))
      .def("apply", &Surgery::apply, py::arg("cuts"))
      .def(
          "kept",
          [](const Surgery& self, const at::Tensor& tensor, int64_t dim) -> std::optional<std::vector<int64_t>> {
            const auto* kept = self.kept(tensor, dim);
            return kept == nullptr ? std::nullopt : std::optional(*kept);
          },
          py::arg("tensor"), py::arg("dim"), "The indices that stay; None when all do.")
      .def("is_cut", &Surgery::is_cut, py::arg("tensor"))
      .def("rollback", &Surgery::rollback)
      .def("commit", &Surgery::commit);
}

}  // namespace rarefy::python
