// What becomes of weights that were packed before (rarefy/quantization/packed_weight.h, rarefy/ops/nf4_pack.h): the file has their
// codes and scales.
#include <ATen/ops/constant_pad_nd.h>
#include <ATen/ops/stack.h>
#include <ATen/ops/zeros_like.h>
#include <rarefy/quantization/packed_weight.h>

#include "graph/call.h"
#include "onnx/translate.h"
#include "quantization/scheme_cache.h"

namespace rarefy::onnx {
namespace {

using quantization::QuantizedTensorParts;

/// The codes of rarefy::pack_nf4, whose rows begin with a byte each, as one stream.
at::Tensor stream_of(const at::Tensor& codes, int64_t columns) {
  if (columns % 2 == 0) {
    return codes.flatten();
  }
  auto single = at::stack({codes.bitwise_and(15), codes.bitwise_right_shift(4)}, 2).flatten(1).narrow(1, 0, columns);
  single = single.flatten();
  if (single.numel() % 2 != 0) {
    single = at::constant_pad_nd(single, {0, 1});
  }
  const auto pairs = single.view({-1, 2});
  return pairs.select(1, 0).bitwise_or(pairs.select(1, 1).bitwise_left_shift(4));
}

/// Of the arguments of rarefy::unpack_nf4: its tensors, and its numbers.
QuantizedTensorParts parts_of_nf4(const graph::Node& node, const std::vector<at::Tensor>& tensors) {
  const auto number = [&](const char* name) { return graph::argument(node, name).toInt(); };
  const auto rows = tensors.at(0).size(0), columns = number("columns");
  auto scheme = quantization::Scheme::nf4(number("block"), /*double_quantized=*/true, /*axis=*/1);
  scheme.format = quantization::NF4{true, number("scale_block")};
  QuantizedTensorParts parts{scheme, {rows, columns}, graph::argument(node, "dtype").toScalarType(), {}};
  parts.tensors["data"] = stream_of(tensors[0], columns);
  parts.tensors["scale"] = tensors.at(1).reshape(scheme.scale_shape(parts.shape));
  parts.tensors["scale_scale"] = tensors.at(2);
  parts.tensors["scale_mean"] = tensors.at(3);
  return parts;
}

bool is_nf4(const graph::Node& node) { return node.op.name == "rarefy::unpack_nf4"; }

/// The tensors of the parts that an operator reads; empty for other operators.
std::vector<int64_t> parts_read_by(const graph::Node& node) {
  if (is_nf4(node)) {
    return {node.input(0), node.input(1), node.input(2), node.input(3)};
  }
  const auto& name = node.op.name;
  const bool reads =
      name == "rarefy::dequantize_packed" || name == "rarefy::packed_linear" || name == "rarefy::packed_embedding";
  return reads ? node.input_values.at(graph::argument_index(node, "parts").value()) : std::vector<int64_t>();
}

std::vector<Value*> linear(const Call& c) {
  auto* y = c.t.emit("MatMul", {c.tensor("x"), c.t.packed_weight(c.node(), /*transposed=*/true)});
  auto* bias = c.optional_tensor("bias");
  if (bias == nullptr) {
    return {y};
  }
  y->shape = c.result_shape();
  y->has_shape = true;
  return {c.t.emit("Add", {y, bias})};
}

std::vector<Value*> embedding(const Call& c) {
  auto* table = c.t.packed_weight(c.node(), /*transposed=*/false);
  return {c.t.emit("Gather", {table, c.tensor("indices")}, {{"axis", int64_t{0}}})};
}

}  // namespace

std::optional<QuantizedTensorParts> Translator::packed(const graph::Node& node) const {
  const auto ids = parts_read_by(node);
  if (ids.empty()) {
    return std::nullopt;
  }
  std::vector<at::Tensor> tensors;
  for (const auto id : ids) {
    const auto origin = graph().values[id].origin;
    if (origin == graph::Origin::input || origin == graph::Origin::intermediate) {
      return std::nullopt;
    }
    tensors.push_back(graph().values[id].tensor.to(at::kCPU));
  }
  if (is_nf4(node)) {
    return parts_of_nf4(node, tensors);
  }
  return quantization::parts_of(tensors, quantization::scheme_of(graph::argument(node, "scheme").toStringRef()),
                                graph::argument(node, "shape").toIntVector(),
                                graph::argument(node, "dtype").toScalarType());
}

Value* Translator::packed_weight(const graph::Node& node, bool transposed) {
  const auto parts = packed(node);
  if (!parts.has_value()) {
    refuse("codes and scales must not depend on the input");
  }
  auto& known = packed_weights_[{parts_read_by(node).front(), transposed}];
  if (known == nullptr) {
    known = weight(*parts, transposed, "weight");
  }
  return known;
}

std::optional<IntegerTensor> scaled_rows(const Translator& t, const graph::Node& node) {
  if (node.op.name != "aten::mul") {
    return std::nullopt;
  }
  const auto *converted = t.maker(node.input(0)), *spread = t.maker(node.input(1));
  if (converted == nullptr || spread == nullptr || converted->op.name != "aten::to" ||
      spread->op.name != "aten::unsqueeze" || graph::argument(*spread, "dim").toInt() != 1) {
    return std::nullopt;
  }
  const auto &values = t.graph().values[converted->input(0)].tensor, &scale = t.graph().values[spread->input(0)].tensor;
  if (!values.defined() || !scale.defined() || values.scalar_type() != at::kChar || values.dim() != 2 ||
      scale.scalar_type() != at::kFloat || scale.dim() != 1 || scale.size(0) != values.size(0)) {
    return std::nullopt;
  }
  const auto zeros = at::zeros_like(scale, at::TensorOptions().dtype(at::kChar));
  return IntegerTensor{values, {scale, zeros, 0, -128, 127}};
}

void add_packed_rules(Rules& rules) {
  rules["rarefy::packed_linear"] = linear;
  rules["rarefy::packed_embedding"] = embedding;
}

}  // namespace rarefy::onnx
