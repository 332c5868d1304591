#include <rarefy/onnx/weight_form.h>
#include <rarefy/quantization/target.h>

#include "bindings.h"

namespace rarefy::python {

void init_target(py::module_& parent) {
  using namespace quantization;
  auto m = parent.def_submodule("quantization");

  py::class_<TargetProfile>(m, "TargetProfile",
                            "What a runtime executes in integers, and where it wants the quantizers: plain data.")
      .def_readonly("name", &TargetProfile::name)
      .def_readonly("families", &TargetProfile::families, "Families of layers that run in integers.")
      .def_readonly("stored", &TargetProfile::stored,
                    "Families that files may hold on their grids, and that the runtime computes in floating point.")
      .def_readonly("per_channel", &TargetProfile::per_channel, "Families whose weights may have a scale per channel.")
      .def_readonly("scales_of_groups", &TargetProfile::scales_of_groups,
                    "Whether channels of every group of a transposed convolution may have scales of their own.")
      .def_readonly("activation_bits", &TargetProfile::activation_bits, "Widths of activations.")
      .def_readonly("wide_activations", &TargetProfile::wide_activations, "Whether files may hold 16-bit activations.")
      .def_readonly("narrow_grids", &TargetProfile::narrow_grids,
                    "Whether grids that do not fill their type can be held, by a Clip of the integers.")
      .def_readonly("unsigned_activations", &TargetProfile::unsigned_activations,
                    "Activations are written as uint8 or uint16.")
      .def_readonly("zero_points", &TargetProfile::zero_points, "Whether zero points other than 0 exist.")
      .def_readonly("weight_zero_points", &TargetProfile::weight_zero_points,
                    "Whether the zero point of symmetric weights is written.")
      .def_readonly("int4_weights", &TargetProfile::int4_weights,
                    "Whether 4-bit weights of layers with a float input are stored as INT4.")
      .def_readonly(
          "formats", &TargetProfile::formats,
          "Formats beside plain grids that files may hold: 'all', 'explicit' (int4 in groups, e4m3) or 'none'.")
      .def_property_readonly(
          "residual", [](const TargetProfile& self) { return str(self.residual); },
          "Inputs of a residual addition that are quantized: 'both' or 'identity'.")
      .def_readonly("quantizes_outputs", &TargetProfile::quantizes_outputs,
                    "Whether a result that only floating-point operations read gets a quantizer.")
      .def_readonly("boundary_inputs", &TargetProfile::boundary_inputs,
                    "Whether inputs of normalizations and activation functions get quantizers too.")
      .def_readonly("quantizes_before_moves", &TargetProfile::quantizes_before_moves,
                    "Whether a quantizer behind pooling or reshaping is repeated before it.")
      .def_property_readonly(
          "clipping", [](const TargetProfile& self) { return str(self.clipping); },
          "Where a ReLU before a quantizer goes: 'keep', 'saturate' or 'integers'.")
      .def_readonly("splits_linear_bias", &TargetProfile::splits_linear_bias,
                    "Whether the bias of a linear layer is written as Gemm or Sum.")
      .def_readonly("pools_means", &TargetProfile::pools_means,
                    "Whether the mean over both image axes is written as GlobalAveragePool.")
      .def_readonly("residual_as_sum", &TargetProfile::residual_as_sum,
                    "Whether a residual before a layer normalization is written as Sum.")
      .def_readonly("dynamic_shapes", &TargetProfile::dynamic_shapes, "Whether inputs may have axes of any size.")
      .def_readonly("oldest_opset", &TargetProfile::oldest_opset, "Oldest ONNX operator set that is written.")
      .def_readonly("default_opset", &TargetProfile::default_opset,
                    "ONNX operator set that is written when none is asked for.")
      .def("executes", &TargetProfile::executes, py::arg("kind"),
           "Whether layers of the kind ('Linear', 'Conv2d', 'Add', ...) run in integers.")
      .def("stores", &TargetProfile::stores, py::arg("kind"),
           "Whether files may hold layers of the kind on their grids.")
      .def("has_per_channel", &TargetProfile::has_per_channel, py::arg("kind"),
           "Whether weights of the kind may have a scale per channel.")
      .def(
          "adapt",
          [](const TargetProfile& self, const Scheme& weight, const std::string& kind) {
            return *self.adapt({.weight = weight}, kind).weight;
          },
          py::arg("weight"), py::arg("kind"),
          "The weight's scheme, with one scale where the target knows no scales per channel for the kind.")
      .def(
          "why_not",
          [](const TargetProfile& self, const std::optional<Scheme>& weight, const std::optional<Scheme>& activation,
             const std::string& kind) { return self.why_not({.weight = weight, .activation = activation}, kind); },
          py::arg("weight"), py::arg("activation"), py::arg("kind"),
          "Why the runtime does not execute such a layer: the rule and the value; None when it does.")
      .def("why_not_written", &TargetProfile::why_not_written, py::arg("activation"),
           "Why no file for the runtime can hold activations on this grid; None when it can.")
      .def("why_weight_not_written", &TargetProfile::why_weight_not_written, py::arg("weight"),
           "Why no file for the runtime can hold weights of this scheme; None when it can.")
      .def("__repr__", [](const TargetProfile& self) { return "TargetProfile('" + self.name + "')"; })
      .def(py::pickle([](const TargetProfile& self) { return py::make_tuple(self.name); },
                      [](const py::tuple& state) { return target_profile(state[0].cast<std::string>()); }));

  m.def("target_profile", &target_profile, py::arg("name"), py::return_value_policy::reference,
        "The profile of a target. Raises ValueError, naming the known ones, for another name.");
  m.def(
      "onnx_weight_form",
      [](const QuantizedTensorParts& parts, int64_t opset, bool transposed, bool zero_points) {
        const auto form = onnx_weight_form(parts, {opset, transposed, zero_points});
        py::list tensors, nodes;
        for (const auto& tensor : form.tensors) {
          tensors.append(py::make_tuple(tensor.name, tensor.values, tensor.is_int4));
        }
        for (const auto& node : form.nodes) {
          py::dict attributes;
          for (const auto& [name, value] : node.attributes) {
            attributes[py::str(name)] = value;
          }
          nodes.append(py::make_tuple(node.op, node.inputs, node.output, attributes, node.dtype, node.shape));
        }
        return py::make_tuple(tensors, nodes);
      },
      py::arg("parts"), py::arg("opset"), py::arg("transposed") = false, py::arg("zero_points") = true,
      R"(A stored weight in ONNX's operators: tensors (name, values, is_int4) and nodes (operator, inputs, output, attributes,
dtype, shape), of which the last gives the weight. rarefy/onnx/weight_form.h says which operators.

Raises ValueError for a weight that is not float32, and where the operator set cannot say it.)");
  m.def("target_names", &target_names, "The names that target_profile knows.");
  m.def(
      "layer_family", &layer_family, py::arg("kind"),
      "'linear', 'conv', 'conv_transpose', 'embedding', 'recurrent', 'boundary', 'attention', 'add', 'mul' or 'cat': the "
      "family of a kind of layer.");
}

}  // namespace rarefy::python
