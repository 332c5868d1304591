#include <pybind11/stl/filesystem.h>
#include <rarefy/pruning/manifest.h>
#include <rarefy/pruning/surgery.h>

#include <filesystem>
#include <map>
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

using Records = std::map<std::string, std::pair<std::vector<int64_t>, Kept>>;  // shape, kept

void write(const Names& names, const Tensors& values, const Records& records, const Attributes& attributes,
           const std::filesystem::path& path) {
  NamedTensors tensors;
  for (size_t i = 0; i < names.size(); ++i) {
    tensors.insert(names[i], values.at(i));
  }
  Manifest manifest{{}, attributes};
  for (const auto& [name, record] : records) {
    manifest.tensors.emplace(name, TensorRecord{record.first, record.second});
  }
  save_pruned(tensors, manifest, path);
}

py::tuple read(const std::filesystem::path& path) {
  const auto checkpoint = load_safetensors(path);
  const auto manifest = read_manifest(checkpoint, path);
  py::dict tensors;
  for (const auto& item : checkpoint.tensors) {
    tensors[py::str(item.key())] = item.value();
  }
  Records records;
  for (const auto& [name, record] : manifest.tensors) {
    records.emplace(name, std::pair(record.shape, record.kept));
  }
  return py::make_tuple(tensors, records, manifest.attributes);
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
      .def("__len__", [](const Cut& self) { return self.kept.size(); })
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

  m.def("write_pruned", &write, py::arg("names"), py::arg("tensors"), py::arg("records"), py::arg("attributes"),
        py::arg("path"), "Writes tensors with what was removed from them: original shapes, kept indices by dimension.");
  m.def("read_pruned", &read, py::arg("path"), "Tensors, records and attributes of a file.");
}

}  // namespace rarefy::python
