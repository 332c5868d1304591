#include <pybind11/functional.h>
#include <rarefy/pruning/permutation.h>

#include "bindings.h"

namespace rarefy::python {
namespace {

using namespace rarefy::pruning;
using Names = std::vector<std::string>;
using Tensors = std::vector<at::Tensor>;

std::vector<NamedParameter> named(const Names& names, const Tensors& values) {
  std::vector<NamedParameter> out;
  for (size_t i = 0; i < names.size(); ++i) {
    out.push_back({names[i], values.at(i)});
  }
  return out;
}

}  // namespace

void init_permutation(py::module_& m) {
  py::class_<PermutationOptions>(m, "PermutationOptions", "Checked options of a channel permutation.")
      .def(py::init([](NM pattern, std::optional<Names> include, Names exclude, int64_t escapes, double effort,
                       uint64_t seed, double tolerance) {
             PermutationOptions options{pattern, std::move(include), std::move(exclude), escapes, effort,
                                        seed,    tolerance};
             options.validate();
             return options;
           }),
           py::arg("pattern"), py::arg("include") = py::none(), py::arg("exclude") = Names(), py::arg("escapes") = 16,
           py::arg("effort") = 2e10, py::arg("seed") = 0, py::arg("tolerance") = 0.0);
  py::class_<GroupOrder>(m, "GroupOrder", "The order of a group's units.")
      .def_readonly("name", &GroupOrder::name, "Of the group.")
      .def_readonly("units", &GroupOrder::units)
      .def_property_readonly(
          "order", [](const GroupOrder& self) { return py::tuple(py::cast(self.order)); },
          "For each place the unit that comes to it; empty when all stay.")
      .def_property_readonly(
          "weights", [](const GroupOrder& self) { return py::tuple(py::cast(self.weights)); },
          "Whose N:M masks depend on the order.")
      .def_readonly("before", &GroupOrder::before, "The magnitude that N:M keeps of these weights.")
      .def_readonly("after", &GroupOrder::after)
      .def_readonly("reason", &GroupOrder::reason, "Why all stay; empty when they do not.")
      .def("__repr__", &GroupOrder::to_string);
  py::class_<PermutationReport>(m, "PermutationReport", "What a channel permutation did, or would do.")
      .def_property_readonly("pattern", [](const PermutationReport& self) { return self.pattern; })
      .def_property_readonly("groups", [](const PermutationReport& self) { return py::tuple(py::cast(self.groups)); })
      .def_readonly("total", &PermutationReport::total, "The magnitude of all weights that count.")
      .def_readonly("before", &PermutationReport::before, "What N:M keeps of it.")
      .def_readonly("after", &PermutationReport::after)
      .def_readonly("difference", &PermutationReport::difference,
                    "Largest difference of the outputs, over the largest output.")
      .def_readonly("attempts", &PermutationReport::attempts, "Comparisons of outputs.")
      .def("__repr__", &PermutationReport::to_string);
  m.def("nm_kept_magnitude", &nm_kept_magnitude, py::arg("weight"), py::arg("pattern"),
        py::call_guard<py::gil_scoped_release>(), "The sum of |w| that an N:M mask along dimension 1 keeps.");
  m.def(
      "find_nm_permutation",
      [](const Structure& structure, const Names& names, const Tensors& values, const PermutationOptions& options) {
        return find_nm_permutation(structure, named(names, values), options);
      },
      py::arg("structure"), py::arg("names"), py::arg("values"), py::arg("options"),
      py::call_guard<py::gil_scoped_release>(), "Orders of groups in which N:M keeps more; nothing is changed.");
  m.def(
      "reorders",
      [](const Structure& structure, const PermutationReport& report) {
        std::vector<std::tuple<std::string, int64_t, std::vector<int64_t>>> out;
        for (auto& change : reorders(structure, report.groups)) {
          out.emplace_back(change.tensor, change.dim, std::move(change.source));
        }
        return out;
      },
      py::arg("structure"), py::arg("report"), "Tensor, dimension and source indices of what an order changes.");
  m.def(
      "permute_for_nm",
      [](const std::function<std::pair<std::shared_ptr<graph::Graph>, std::string>()>& record,
         std::vector<graph::NamedTensor> tensors, const Names& parameters, const Names& state_names,
         const Tensors& state, std::function<std::vector<Cut>(const std::vector<Cut>&)> also,
         const PermutationOptions& options) {
        PermutableModel model;
        model.record = [&record] {
          auto [graph, failure] = record();
          return Recording{std::move(*graph), std::move(failure)};
        };
        model.tensors = std::move(tensors);
        for (size_t i = 0; i < parameters.size(); ++i) {
          model.state.push_back({parameters[i], state_names.at(i), state.at(i)});
        }
        model.also = std::move(also);
        return permute_for_nm(model, options);
      },
      py::arg("record"), py::arg("tensors"), py::arg("parameters"), py::arg("state_names"), py::arg("state"),
      py::arg("also"), py::arg("options"), "The transaction that both languages share.");
}

}  // namespace rarefy::python
