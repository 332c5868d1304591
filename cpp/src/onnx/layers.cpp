// What becomes of convolutions, products, pooling, normalization and attention.
#include <ATen/ops/full.h>
#include <ATen/ops/ones.h>
#include <ATen/ops/zeros.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <limits>

#include "onnx/translate.h"

namespace rarefy::onnx {
namespace {

/// The spatial sizes of a tensor, which ONNX's attributes need as numbers.
std::vector<int64_t> spatial(const Call& c, const Shape& shape, size_t dims) {
  std::vector<int64_t> out;
  for (size_t i = shape.size() - dims; i < shape.size(); ++i) {
    if (!shape[i].is_fixed()) {
      c.refuse("spatial sizes must not depend on the size of the batch (dynamic_batch = false fixes them)");
    }
    out.push_back(shape[i].size);
  }
  return out;
}

/// Of the operators that pool: bytes have one of their own, with another name for its argument.
const char* pooled(const Call& c) { return c.node().op.name.starts_with("rarefy::") ? "x" : "self"; }

void require_batch(const Call& c, std::string_view input, size_t dims) {
  if (c.shape_of(input).size() != dims + 2) {
    c.refuse("its input must have a batch dimension");
  }
}

/// What is padded before, and as much after.
std::vector<int64_t> both_sides(const std::vector<int64_t>& padding) {
  auto out = padding;
  out.insert(out.end(), padding.begin(), padding.end());
  return out;
}

// ---- convolutions ----------------------------------------------------------------------------------------------------

/// Padding by name ("same", "valid"), with the larger half behind.
std::vector<int64_t> named_padding(const Call& c, const Shape& weight, const std::vector<int64_t>& dilation) {
  const auto dims = dilation.size();
  std::vector<int64_t> out(2 * dims, 0);
  if (c.text("padding") == "same") {
    for (size_t i = 0; i < dims; ++i) {
      const auto total = dilation[i] * (weight[i + 2].size - 1);
      out[i] = total / 2;
      out[dims + i] = total - total / 2;
    }
  }
  return out;
}

Rule convolution(size_t dims) {
  return [dims](const Call& c) -> std::vector<Value*> {
    require_batch(c, "input", dims);
    const auto kernel = spatial(c, c.shape_of("weight"), dims);
    const auto dilation = c.integers("dilation", dims);
    const bool named = !c.text("padding").empty();
    const auto pads =
        named ? named_padding(c, c.shape_of("weight"), dilation) : both_sides(c.integers("padding", dims));
    std::vector<Value*> inputs{c.tensor("input"), c.tensor("weight")};
    if (auto* bias = c.optional_tensor("bias")) {
      inputs.push_back(bias);
    }
    return {c.t.emit("Conv", inputs,
                     {{"kernel_shape", kernel},
                      {"strides", c.integers("stride", dims)},
                      {"pads", pads},
                      {"dilations", dilation},
                      {"group", c.integer("groups")}})};
  };
}

/// The integers of a weight with scales per channel of several groups: they are rounded as [in / groups, out, kernel...]
/// (ops::weight_by_channel), and what the layer reads was moved since. Null for other weights.
Value* grouped_weight(const Call& c) {
  constexpr std::array<std::string_view, 6> kMoves{"aten::flatten", "aten::reshape",   "aten::view",
                                                   "aten::clone",   "aten::transpose", "aten::unflatten"};
  const auto groups = c.integer("groups");
  const auto* made_by = c.t.maker(c.node().input(1));
  if (groups == 1 || !c.constant("weight").defined()) {
    return nullptr;
  }
  while (made_by != nullptr && std::find(kMoves.begin(), kMoves.end(), made_by->op.name) != kMoves.end()) {
    const auto source = made_by->input(0);
    if (const auto weight = c.t.integers(source); weight.has_value() && weight->grid.axis == 1) {
      return by_group(c.t, c.t.weight(*weight, "weight"), weight->values.sizes().vec(), groups);
    }
    if (const auto parts = c.t.stored(source)) {
      return by_group(c.t, c.t.weight(*parts, /*transposed=*/false, "weight"), parts->shape, groups);
    }
    made_by = c.t.maker(source);
  }
  return nullptr;
}

Rule transposed_convolution(size_t dims) {
  return [dims](const Call& c) -> std::vector<Value*> {
    require_batch(c, "input", dims);
    auto* grouped = grouped_weight(c);
    std::vector<Value*> inputs{c.tensor("input"), grouped != nullptr ? grouped : c.tensor("weight")};
    if (auto* bias = c.optional_tensor("bias")) {
      inputs.push_back(bias);
    }
    return {c.t.emit("ConvTranspose", inputs,
                     {{"kernel_shape", spatial(c, c.shape_of("weight"), dims)},
                      {"strides", c.integers("stride", dims)},
                      {"pads", both_sides(c.integers("padding", dims))},
                      {"output_padding", c.integers("output_padding", dims)},
                      {"dilations", c.integers("dilation", dims)},
                      {"group", c.integer("groups")}})};
  };
}

// ---- products --------------------------------------------------------------------------------------------------------

Value* transpose_last(const Call& c, Value* x, size_t rank) {
  std::vector<int64_t> order;
  for (size_t i = 0; i < rank; ++i) {
    order.push_back(static_cast<int64_t>(i));
  }
  std::swap(order[rank - 1], order[rank - 2]);
  return c.t.emit("Transpose", {x}, {{"perm", order}});
}

/// x times the transpose of a weight, which is stored transposed: nothing stands between its integers and the product.
std::vector<Value*> linear(const Call& c) {
  auto* weight = c.transposed_weight("weight");
  if (weight == nullptr) {
    weight = transpose_last(c, c.tensor("weight"), 2);
  }
  auto* product = c.t.emit("MatMul", {c.tensor("input"), weight});
  auto* bias = c.optional_tensor("bias");
  if (bias == nullptr) {
    return {product};
  }
  product->shape = c.result_shape();
  product->has_shape = true;
  return {c.t.emit("Add", {product, bias})};
}

Rule product(const char* first, const char* second) {
  return
      [=](const Call& c) -> std::vector<Value*> { return {c.t.emit("MatMul", {c.tensor(first), c.tensor(second)})}; };
}

/// beta * self + alpha * a b.
Rule added_product(const char* first, const char* second) {
  return [=](const Call& c) -> std::vector<Value*> {
    const auto scaled = [&](Value* x, const char* factor) {
      return c.number(factor) == 1.0 ? x : c.t.emit("Mul", {x, c.t.scalar(c.number(factor), x->dtype)});
    };
    auto* result = scaled(c.t.emit("MatMul", {c.tensor(first), c.tensor(second)}), "alpha");
    return {c.number("beta") == 0.0 ? result : c.t.emit("Add", {result, scaled(c.tensor("self"), "beta")})};
  };
}

std::vector<Value*> embedding(const Call& c) {
  const auto& tables = c.t.options().tables;
  const auto& recorded = c.t.graph().values[c.node().input(0)];
  auto* indices = c.tensor("indices");
  const auto table = tables.find(recorded.name);
  if (table == tables.end()) {
    return {c.t.emit("Gather", {c.tensor("weight"), indices}, {{"axis", int64_t{0}}})};
  }
  // Rows are looked up as integers, so that a run dequantizes what it reads and not the table.
  const auto& [values, scale, bias] = table->second;
  auto* rows = c.t.emit("Gather", {c.t.constant(values, "weight"), indices}, {{"axis", int64_t{0}}});
  if (scale.numel() == 1) {
    return {c.t.emit("DequantizeLinear", {rows, c.t.constant(scale.reshape({}), "weight_scale")}, {}, at::kFloat)};
  }
  auto* scales =
      c.t.emit("Gather", {c.t.constant(scale.reshape({-1, 1}), "weight_scale"), indices}, {{"axis", int64_t{0}}});
  return {c.t.emit("Mul", {c.t.cast(rows, at::kFloat), scales})};
}

// ---- pooling ---------------------------------------------------------------------------------------------------------

struct Window {
  std::vector<int64_t> kernel, stride, dilation, pads;
  bool extends = false;  // ceil_mode: the last window reaches beyond the padding
};

Window window_of(const Call& c, size_t dims) {
  require_batch(c, pooled(c), dims);
  Window w;
  w.kernel = c.integers("kernel_size", dims);
  w.stride = c.integers("stride", dims);
  w.stride = w.stride.empty() ? w.kernel : w.stride;
  w.dilation = c.has("dilation") ? c.integers("dilation", dims) : std::vector<int64_t>(dims, 1);
  w.pads = both_sides(c.integers("padding", dims));
  const auto in = spatial(c, c.shape_of(pooled(c)), dims), out = spatial(c, c.result_shape(), dims);
  for (size_t i = 0; i < dims; ++i) {
    // torch and ONNX do not agree on which last windows there are: the pads are made to give the sizes of the run.
    const auto reach = (out[i] - 1) * w.stride[i] + w.dilation[i] * (w.kernel[i] - 1) + 1;
    const auto behind = std::max(reach - in[i] - w.pads[i], int64_t{0});
    w.extends = w.extends || behind > w.pads[dims + i];
    w.pads[dims + i] = std::max(w.pads[dims + i], behind);
  }
  return w;
}

Rule max_pool(size_t dims) {
  return [dims](const Call& c) -> std::vector<Value*> {
    const auto w = window_of(c, dims);
    return {c.t.emit("MaxPool", {c.tensor(pooled(c))},
                     {{"kernel_shape", w.kernel}, {"strides", w.stride}, {"pads", w.pads}, {"dilations", w.dilation}})};
  };
}

Rule average_pool(size_t dims) {
  return [dims](const Call& c) -> std::vector<Value*> {
    const auto w = window_of(c, dims);
    if (w.extends) {
      c.refuse("windows must not reach beyond the padding (ceil_mode)");
    }
    if (c.has("divisor_override")) {
      c.refuse("divisor_override must not be given");
    }
    return {c.t.emit("AveragePool", {c.tensor("self")},
                     {{"kernel_shape", w.kernel},
                      {"strides", w.stride},
                      {"pads", w.pads},
                      {"count_include_pad", int64_t{c.flag("count_include_pad")}}})};
  };
}

/// Where windows are equal: pooling; over everything: global pooling.
Rule adaptive_pool(const std::string& kind, size_t dims) {
  return [=](const Call& c) -> std::vector<Value*> {
    require_batch(c, "self", dims);
    const auto in = spatial(c, c.shape_of("self"), dims), out = spatial(c, c.result_shape(), dims);
    if (std::all_of(out.begin(), out.end(), [](int64_t size) { return size == 1; })) {
      return {c.t.emit("Global" + kind, {c.tensor("self")})};
    }
    std::vector<int64_t> kernel;
    for (size_t i = 0; i < dims; ++i) {
      if (in[i] % out[i] != 0) {
        c.refuse("output sizes must divide the input sizes, got " + std::to_string(out[i]) + " for " +
                 std::to_string(in[i]));
      }
      kernel.push_back(in[i] / out[i]);
    }
    return {c.t.emit(kind, {c.tensor("self")}, {{"kernel_shape", kernel}, {"strides", kernel}})};
  };
}

// ---- normalization ---------------------------------------------------------------------------------------------------

/// A weight, or ones of the shape; a bias, or zeros.
Value* affine(const Call& c, const char* name, at::IntArrayRef sizes, double otherwise) {
  auto* given = c.optional_tensor(name);
  return given != nullptr ? given
                          : c.t.constant(at::full(sizes, otherwise, at::TensorOptions().dtype(c.result_dtype())), name);
}

std::vector<Value*> batch_norm(const Call& c) {
  if (c.flag("training") || !c.is_tensor("running_mean")) {
    c.refuse("it must use running statistics");
  }
  const auto channels = c.shape_of("input").at(1).size;
  return {c.t.emit("BatchNormalization",
                   {c.tensor("input"), affine(c, "weight", {channels}, 1), affine(c, "bias", {channels}, 0),
                    c.tensor("running_mean"), c.tensor("running_var")},
                   {{"epsilon", static_cast<float>(c.number("eps"))}})};
}

std::vector<Value*> layer_norm(const Call& c) {
  auto* x = c.tensor("input");
  const auto sizes = c.integers("normalized_shape");
  auto* weight = affine(c, "weight", sizes, 1);
  const auto count = static_cast<int64_t>(sizes.size());
  if (c.t.opset() >= 17) {
    std::vector<Value*> inputs{x, weight};
    if (auto* bias = c.optional_tensor("bias")) {
      inputs.push_back(bias);
    }
    return {
        c.t.emit("LayerNormalization", inputs, {{"axis", -count}, {"epsilon", static_cast<float>(c.number("eps"))}})};
  }
  std::vector<int64_t> axes;
  for (int64_t i = -count; i < 0; ++i) {
    axes.push_back(i);
  }
  const auto mean = [&](Value* value) { return c.t.emit("ReduceMean", {value}, {{"axes", axes}}); };
  auto* centered = c.t.emit("Sub", {x, mean(x)});
  auto* variance = mean(c.t.emit("Mul", {centered, centered}));
  auto* deviation = c.t.emit("Sqrt", {c.t.emit("Add", {variance, c.t.scalar(c.number("eps"), x->dtype)})});
  auto* result = c.t.emit("Mul", {c.t.emit("Div", {centered, deviation}), weight});
  auto* bias = c.optional_tensor("bias");
  return {bias == nullptr ? result : c.t.emit("Add", {result, bias})};
}

/// Groups as the channels of an instance normalization.
std::vector<Value*> group_norm(const Call& c) {
  auto* x = c.tensor("input");
  const auto shape = c.shape_of("input");
  const auto groups = c.integer("num_groups");
  const auto options = at::TensorOptions().dtype(c.result_dtype());
  auto* grouped = c.t.emit("Reshape", {x, c.t.integers(std::vector<int64_t>{0, groups, -1})});
  auto* result = c.t.emit(
      "InstanceNormalization",
      {grouped, c.t.constant(at::ones({groups}, options), "ones"), c.t.constant(at::zeros({groups}, options), "zeros")},
      {{"epsilon", static_cast<float>(c.number("eps"))}});
  result = c.t.reshape(result, shape);
  Shape per_channel(shape.size() - 1, Dim{1, 0});
  per_channel[0] = shape[1];
  if (auto* weight = c.optional_tensor("weight")) {
    result = c.t.emit("Mul", {result, c.t.reshape(weight, per_channel)});
  }
  if (auto* bias = c.optional_tensor("bias")) {
    result = c.t.emit("Add", {result, c.t.reshape(bias, per_channel)});
  }
  return {result};
}

// ---- attention -------------------------------------------------------------------------------------------------------

/// What is added to the scores: nothing, a mask of numbers, or -inf where a mask of truth values is false.
Value* attention_mask(const Call& c, at::ScalarType dtype) {
  if (c.flag("is_causal")) {
    const auto queries = c.shape_of("query"), keys = c.shape_of("key");
    const auto &rows = queries[queries.size() - 2], &columns = keys[keys.size() - 2];
    if (!rows.is_fixed() || !columns.is_fixed()) {
      c.refuse("the lengths of a causal mask must be fixed (dynamic_batch = false fixes them)");
    }
    const auto infinite =
        at::full({rows.size, columns.size}, -std::numeric_limits<double>::infinity(), at::TensorOptions().dtype(dtype));
    return c.t.constant(infinite.triu(1), "causal_mask");
  }
  auto* mask = c.optional_tensor("attn_mask");
  if (mask == nullptr || mask->dtype != at::kBool) {
    return mask == nullptr ? nullptr : c.t.cast(mask, dtype);
  }
  return c.t.emit("Where", {mask, c.t.scalar(0, dtype), c.t.scalar(-std::numeric_limits<double>::infinity(), dtype)},
                  {}, dtype);
}

/// softmax(query key^T * scale + mask) value.
std::vector<Value*> attention(const Call& c) {
  if (c.flag("enable_gqa")) {
    c.refuse("enable_gqa must be off");
  }
  auto* query = c.tensor("query");
  const auto features = c.shape_of("query").back();
  if (!features.is_fixed()) {
    c.refuse("the number of features must not depend on the size of the batch (dynamic_batch = false fixes it)");
  }
  const auto scale = c.has("scale") ? c.number("scale") : 1.0 / std::sqrt(static_cast<double>(features.size));
  auto* keys = transpose_last(c, c.tensor("key"), c.shape_of("key").size());
  auto* scores = c.t.emit("MatMul", {query, keys});
  scores = c.t.emit("Mul", {scores, c.t.scalar(scale, query->dtype)});
  if (auto* mask = attention_mask(c, query->dtype)) {
    scores = c.t.emit("Add", {scores, mask});
  }
  auto* weights = c.t.emit("Softmax", {scores}, {{"axis", int64_t{-1}}});
  return {c.t.emit("MatMul", {weights, c.tensor("value")})};
}

}  // namespace

Value* by_group(Translator& t, Value* weight, const std::vector<int64_t>& sizes, int64_t groups) {
  if (groups == 1) {
    return weight;
  }
  std::vector<int64_t> split{sizes[0], groups, sizes[1] / groups}, order{1, 0},
      merged{sizes[0] * groups, sizes[1] / groups};
  for (size_t i = 2; i <= sizes.size(); ++i) {
    order.push_back(static_cast<int64_t>(i));
  }
  split.insert(split.end(), sizes.begin() + 2, sizes.end());
  merged.insert(merged.end(), sizes.begin() + 2, sizes.end());
  auto* moved = t.emit("Transpose", {t.reshape(weight, fixed(split))}, {{"perm", order}});
  return t.reshape(moved, fixed(merged));
}

void add_layer_rules(Rules& rules) {
  rules["conv1d"] = convolution(1);
  rules["conv2d"] = convolution(2);
  rules["conv3d"] = convolution(3);
  rules["conv_transpose1d"] = transposed_convolution(1);
  rules["conv_transpose2d"] = transposed_convolution(2);
  rules["conv_transpose3d"] = transposed_convolution(3);
  rules["linear"] = linear;
  rules["matmul"] = product("self", "other");
  rules["mm"] = rules["bmm"] = product("self", "mat2");
  rules["addmm"] = added_product("mat1", "mat2");
  rules["baddbmm"] = added_product("batch1", "batch2");
  rules["embedding"] = embedding;
  rules["max_pool1d"] = max_pool(1);
  rules["max_pool2d"] = rules["rarefy::max_pool2d_bytes"] = max_pool(2);
  rules["max_pool3d"] = max_pool(3);
  rules["avg_pool1d"] = average_pool(1);
  rules["avg_pool2d"] = average_pool(2);
  rules["avg_pool3d"] = average_pool(3);
  for (const auto& [name, kind, dims] : {std::tuple{"adaptive_avg_pool1d", "AveragePool", 1},
                                         {"adaptive_avg_pool2d", "AveragePool", 2},
                                         {"adaptive_avg_pool3d", "AveragePool", 3}}) {
    rules[name] = adaptive_pool(kind, static_cast<size_t>(dims));
  }
  rules["batch_norm"] = batch_norm;
  rules["layer_norm"] = layer_norm;
  rules["group_norm"] = group_norm;
  rules["scaled_dot_product_attention"] = attention;
}

}  // namespace rarefy::onnx
