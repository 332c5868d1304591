// What becomes of layers that compute in integers (rarefy/ops/quantized.h): the float layer between its quantizers.
#include <ATen/ops/zeros_like.h>
#include <rarefy/ops/conv_transpose.h>

#include "onnx/translate.h"

namespace rarefy::onnx {
namespace {

/// The names of a grid's arguments.
struct GridNames {
  const char *scale, *zero_point, *qmin, *qmax;
};
constexpr GridNames kInput{"input_scale", "input_zero_point", "qmin", "qmax"};
constexpr GridNames kOutput{"output_scale", "output_zero_point", "output_qmin", "output_qmax"};

Grid grid_of(const Call& c, const GridNames& names) {
  const auto scale = c.constant(names.scale), zero_point = c.constant(names.zero_point);
  if (!scale.defined() || !zero_point.defined()) {
    c.refuse("scale and zero point must not depend on the input");
  }
  const auto qmin = c.integer(names.qmin);
  return c.t.as_written({scale.reshape({}), zero_point.to(qmin < 0 ? at::kChar : at::kByte).reshape({}), std::nullopt,
                         qmin, c.integer(names.qmax)});
}

/// An input on its grid: from floating point through a quantizer, from bytes as they are.
Value* read(const Call& c, const char* name, const GridNames& names) {
  auto* x = c.tensor(name);
  const auto grid = grid_of(c, names);
  if (x->dtype == at::kByte && grid.zero_point.scalar_type() != at::kByte) {
    c.refuse("the target has no bytes without a sign between layers: export the model before it is converted");
  }
  return c.t.dequantize(x->dtype == at::kByte ? x : c.t.quantize(x, grid), grid);
}

/// A result, in floating point or as bytes.
std::vector<Value*> finish(const Call& c, Value* y, bool relu) {
  y->shape = c.result_shape();
  y->has_shape = true;
  if (relu) {
    y = c.t.emit("Relu", {y});
    y->shape = c.result_shape();
    y->has_shape = true;
  }
  return {c.is_tensor(kOutput.scale) ? c.t.quantize(y, grid_of(c, kOutput)) : y};
}

/// The weight of a layer, int8, with a scale per row or one for all.
Value* weight_of(const Call& c, bool transposed) {
  auto values = c.constant("weight");
  auto scale = c.constant("weight_scale");
  if (!values.defined() || !scale.defined() || values.scalar_type() != at::kChar) {
    c.refuse("weight and weight_scale must be constants, and the weight int8");
  }
  const bool per_channel = scale.numel() > 1;
  scale = scale.reshape(per_channel ? at::IntArrayRef({-1}) : at::IntArrayRef());
  values = transposed ? values.t() : values;
  const auto axis = per_channel ? std::optional<int64_t>(transposed ? 1 : 0) : std::nullopt;
  return c.t.weight({values, {scale, at::zeros_like(scale, at::TensorOptions().dtype(at::kChar)), axis, -128, 127}},
                    "weight");
}

std::vector<Value*> linear(const Call& c) {
  auto* y = c.t.emit("MatMul", {read(c, "x", kInput), weight_of(c, /*transposed=*/true)});
  if (auto* bias = c.optional_tensor("bias")) {
    y->shape = c.result_shape();
    y->has_shape = true;
    y = c.t.emit("Add", {y, bias});
  }
  return finish(c, y, c.flag("relu"));
}

std::vector<Value*> convolution(const Call& c) {
  const auto weight_shape = c.shape_of("weight");
  const size_t dims = weight_shape.size() - 2;
  std::vector<int64_t> kernel;
  for (size_t i = 2; i < weight_shape.size(); ++i) {
    kernel.push_back(weight_shape[i].size);
  }
  // One value per dimension, or two, before and after; ONNX has all that come before first.
  const auto padding = c.integers("padding");
  const size_t step = padding.size() == dims ? 1 : 2;
  std::vector<int64_t> pads(2 * dims);
  for (size_t i = 0; i < dims; ++i) {
    pads[i] = padding.at(i * step);
    pads[dims + i] = padding.at(i * step + step - 1);
  }
  std::vector<Value*> inputs{read(c, "x", kInput), weight_of(c, /*transposed=*/false)};
  if (auto* bias = c.optional_tensor("bias")) {
    inputs.push_back(bias);
  }
  auto* y = c.t.emit("Conv", inputs,
                     {{"kernel_shape", kernel},
                      {"strides", c.integers("stride", dims)},
                      {"pads", pads},
                      {"dilations", c.integers("dilation", dims)},
                      {"group", c.integer("groups")}});
  return finish(c, y, c.flag("relu"));
}

std::vector<Value*> transposed_convolution(const Call& c) {
  auto values = c.constant("weight");
  auto scale = c.constant("weight_scale");
  if (!values.defined() || !scale.defined() || values.scalar_type() != at::kChar) {
    c.refuse("weight and weight_scale must be constants, and the weight int8");
  }
  const auto groups = c.integer("groups");
  const bool per_channel = scale.numel() > 1;
  scale = scale.reshape(per_channel ? at::IntArrayRef({-1}) : at::IntArrayRef());
  // Only with all output channels on one axis can each have a scale.
  values = per_channel ? ops::weight_by_channel(values, groups) : values;
  const auto axis = per_channel ? std::optional<int64_t>(1) : std::nullopt;
  auto* weight = c.t.weight(
      {values, {scale, at::zeros_like(scale, at::TensorOptions().dtype(at::kChar)), axis, -128, 127}}, "weight");
  weight = per_channel ? by_group(c.t, weight, values.sizes().vec(), groups) : weight;
  const auto sizes = values.sizes();
  const auto padding = c.integers("padding");
  auto pads = padding;
  pads.insert(pads.end(), padding.begin(), padding.end());
  std::vector<Value*> inputs{read(c, "x", kInput), weight};
  if (auto* bias = c.optional_tensor("bias")) {
    inputs.push_back(bias);
  }
  auto* y = c.t.emit("ConvTranspose", inputs,
                     {{"kernel_shape", sizes.slice(2).vec()},
                      {"strides", c.integers("stride")},
                      {"pads", pads},
                      {"output_padding", c.integers("output_padding")},
                      {"dilations", c.integers("dilation")},
                      {"group", groups}});
  return finish(c, y, c.flag("relu"));
}

std::vector<Value*> add(const Call& c) {
  auto* a = read(c, "a", {"a_scale", "a_zero_point", "a_qmin", "a_qmax"});
  auto* b = read(c, "b", {"b_scale", "b_zero_point", "b_qmin", "b_qmax"});
  return finish(c, c.t.emit("Add", {a, b}), c.flag("relu"));
}

std::vector<Value*> requantize(const Call& c) {
  return finish(c, read(c, "x", {"scale", "zero_point", "qmin", "qmax"}), /*relu=*/false);
}

}  // namespace

void add_converted_rules(Rules& rules) {
  rules["rarefy::quantized_linear"] = linear;
  rules["rarefy::quantized_conv"] = convolution;
  rules["rarefy::quantized_conv_transpose"] = transposed_convolution;
  rules["rarefy::quantized_add"] = add;
  rules["rarefy::requantize"] = requantize;
}

}  // namespace rarefy::onnx
