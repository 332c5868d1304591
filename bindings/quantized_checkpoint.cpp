#include <pybind11/stl/filesystem.h>
#include <rarefy/quantization/quantized_checkpoint.h>

#include <filesystem>
#include <map>
#include <set>

#include "bindings.h"

namespace rarefy::python {
namespace {

using namespace rarefy::quantization;

using Packing = std::optional<std::tuple<Scheme, std::vector<int64_t>, c10::ScalarType>>;
using Range = std::optional<std::pair<int64_t, int64_t>>;

SavedLayer make_layer(std::string kind, bool relu, bool channels_last, std::map<std::string, Scheme> quantizers,
                      const Range& next, const std::optional<std::string>& target, const Packing& packed) {
  SavedLayer layer{std::move(kind),     relu,        channels_last, std::move(quantizers), std::nullopt,
                   target.value_or(""), std::nullopt};
  if (packed.has_value()) {
    layer.packed = SavedPacking{std::get<0>(*packed), std::get<1>(*packed), std::get<2>(*packed)};
  }
  if (next.has_value()) {
    layer.next = IntegerRange{next->first, next->second};
  }
  return layer;
}

void write(const std::vector<std::string>& names, const std::vector<at::Tensor>& tensors,
           std::map<std::string, SavedLayer> layers, std::set<std::string> folded,
           const std::filesystem::path& folder) {
  QuantizedCheckpoint checkpoint{std::move(layers), std::move(folded), NamedTensors()};
  for (size_t i = 0; i < names.size(); ++i) {
    checkpoint.tensors.insert(names[i], tensors.at(i));
  }
  write_quantized(checkpoint, folder);
}

py::tuple read(const std::filesystem::path& folder) {
  const auto checkpoint = read_quantized(folder);
  py::dict tensors;
  for (const auto& item : checkpoint.tensors) {
    tensors[py::str(item.key())] = item.value();
  }
  return py::make_tuple(tensors, checkpoint.layers, checkpoint.folded);
}

}  // namespace

void init_quantized_checkpoint(py::module_& parent) {
  auto m = parent.def_submodule("quantization");

  py::class_<SavedLayer>(m, "SavedLayer", "What a file says of one converted layer.")
      .def(py::init(&make_layer), py::arg("kind"), py::arg("relu"), py::arg("channels_last"), py::arg("quantizers"),
           py::arg("next"), py::arg("target"), py::arg("packed") = py::none())
      .def_readonly("kind", &SavedLayer::kind, "'Linear', 'Conv2d' (batch normalization folded in or not), 'Add', ...")
      .def_readonly("relu", &SavedLayer::relu, "Whether max(y, 0) is part of the layer.")
      .def_readonly("channels_last", &SavedLayer::channels_last, "Whether the weight lies channels-last in memory.")
      .def_readonly("quantizers", &SavedLayer::quantizers, "The grids by the names of their quantizers.")
      .def_property_readonly(
          "next",
          [](const SavedLayer& self) -> Range {
            return self.next.has_value() ? Range({self.next->qmin, self.next->qmax}) : std::nullopt;
          },
          "The ends of the grid of the bytes that the layer hands on; None where it gives floats.")
      .def_property_readonly(
          "target",
          [](const SavedLayer& self) { return self.target.empty() ? std::nullopt : std::optional(self.target); },
          "The runtime that the layer was prepared for; None when none was chosen.")
      .def_property_readonly(
          "packed",
          [](const SavedLayer& self) -> Packing {
            return self.packed.has_value() ? Packing({self.packed->scheme, self.packed->shape, self.packed->dtype})
                                           : std::nullopt;
          },
          "Scheme, shape and dtype of a weight that is kept as codes and scales; None for int8.")
      .def(py::self == py::self)
      .def("__hash__", [](const SavedLayer& self) { return py::hash(py::str(self.kind)); })
      .def("__repr__", [](const SavedLayer& self) {
        return "SavedLayer(kind='" + self.kind + "', relu=" + (self.relu ? "True" : "False") + ", " +
               std::to_string(self.quantizers.size()) + " quantizers)";
      });

  m.def("weight_quantizer", &weight_quantizer, py::arg("kind"), py::arg("tensor"),
        "The quantizer of a tensor of a layer with several weights; None for tensors that are none of its weights.");
  m.def("write_quantized", &write, py::arg("names"), py::arg("tensors"), py::arg("layers"), py::arg("folded"),
        py::arg("folder"), "Writes the state of a converted model, with what its layers are.");
  m.def("read_quantized", &read, py::arg("folder"), "Tensors, layers and folded batch normalizations of a folder.");
}

}  // namespace rarefy::python
