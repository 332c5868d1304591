#include "onnx/passes.h"

#include <ATen/ops/full.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstring>
#include <functional>
#include <limits>
#include <optional>

namespace rarefy::onnx {
namespace {

// ---- reading the model ------------------------------------------------------------------------------------------------

bool same(const Value* a, const Value* b) {
  if (a == b) {
    return true;
  }
  return a != nullptr && b != nullptr && a->constant.defined() && b->constant.defined() &&
         a->constant.scalar_type() == b->constant.scalar_type() && a->constant.sizes() == b->constant.sizes() &&
         std::memcmp(a->constant.const_data_ptr(), b->constant.const_data_ptr(), a->constant.nbytes()) == 0;
}

bool is(const Node* node, std::string_view op) { return node != nullptr && node->op == op; }

bool is_per_channel(const Node* node) { return node->inputs[1]->constant.dim() > 0; }

bool same_parameters(const Node* a, const Node* b) {
  return same(a->input(1), b->input(1)) && same(a->input(2), b->input(2)) &&
         (!is_per_channel(a) || a->integer("axis", 1) == b->integer("axis", 1));
}

bool only_readers(const Model& model, const Value* value, std::string_view op) {
  return !value->consumers.empty() && !model.is_output(value) &&
         std::all_of(value->consumers.begin(), value->consumers.end(), [&](const Node* node) { return is(node, op); });
}

bool is_dequantized(const Value* value) { return is(value->producer, "DequantizeLinear"); }

/// Operators that give back elements of their first input, so that quantizing before or after them is the same.
constexpr std::array<std::string_view, 8> kMovesValues = {"MaxPool", "Reshape",   "Flatten", "Transpose",
                                                          "Squeeze", "Unsqueeze", "Slice",   "Expand"};

bool moves_values(const Node* node) {
  return std::find(kMovesValues.begin(), kMovesValues.end(), node->op) != kMovesValues.end();
}

std::string stem(const Node* node) {
  const auto slash = node->name.rfind('/');
  return slash == std::string::npos ? "" : node->name.substr(0, slash + 1);
}

// ---- changing it ------------------------------------------------------------------------------------------------------

/// Lets the readers of a node's result read `value`, and removes the node.
void bypass(Model& model, Node* node, Value* value) {
  model.replace(node->outputs[0], value);
  model.remove(node);
}

Value* add_like(Model& model, const Node* before, const std::string& name, const std::string& op,
                std::vector<Value*> inputs, at::ScalarType dtype, const Value* like, Attributes attributes = {}) {
  auto* value = model.add_node(name, op, std::move(inputs), std::move(attributes), dtype, 1, before)->outputs[0];
  value->shape = like->shape;
  value->has_shape = like->has_shape;
  return value;
}

/// The node that comes after `node` in the list, to insert behind it; null at the end.
const Node* after(const Model& model, const Node* node) {
  auto place = std::find_if(model.nodes().begin(), model.nodes().end(), [&](const auto& n) { return n.get() == node; });
  ++place;
  return place == model.nodes().end() ? nullptr : place->get();
}

using Equal = std::function<bool(const Node*, const Node*)>;

int64_t fold(Model& model, std::string_view op, const Equal& equal) {
  int64_t merged = 0;
  for (auto* node : model.nodes({op})) {
    if (node->removed) {
      continue;
    }
    const auto readers = node->inputs[0]->consumers;
    for (auto* other : readers) {
      // Nodes that come later in the list are removed: the first one's result is there for all.
      if (other != node && !other->removed && other->op == op && other->inputs[0] == node->inputs[0] &&
          equal(node, other)) {
        bypass(model, other, node->outputs[0]);
        ++merged;
      }
    }
  }
  return merged;
}

bool equal_inputs(const Node* a, const Node* b) {
  if (a->inputs.size() != b->inputs.size()) {
    return false;
  }
  for (size_t i = 1; i < a->inputs.size(); ++i) {
    if (!same(a->inputs[i], b->inputs[i])) {
      return false;
    }
  }
  return true;
}

}  // namespace

int64_t merge_duplicates(Model& model) {
  int64_t total = 0;
  for (int64_t merged = 1; merged > 0; total += merged) {
    merged = fold(model, "QuantizeLinear", same_parameters);
    merged += fold(model, "Clip", equal_inputs);
    merged += fold(model, "DequantizeLinear", same_parameters);
    for (auto* node : model.nodes({"QuantizeLinear"})) {
      const auto* source = node->inputs[0]->producer;
      if (is(source, "DequantizeLinear") && same_parameters(source, node)) {
        bypass(model, node, source->inputs[0]);
        ++merged;
      }
    }
  }
  return total;
}

namespace {

bool is_integral(const Value* value) { return at::isIntegralType(value->dtype, /*includeBool=*/false); }

bool never_negative(const Value* value) {
  const auto* node = value->producer;
  if (node == nullptr) {
    return false;
  }
  if (is(node, "Relu")) {
    return true;
  }
  if (is(node, "DequantizeLinear")) {
    const auto* zero_point = node->input(2);
    if (zero_point != nullptr && zero_point->constant.defined() && is_integral(zero_point)) {
      const int64_t lowest = zero_point->dtype == at::kChar ? -128 : zero_point->dtype == at::kShort ? -32768 : 0;
      if ((zero_point->constant.to(at::kLong) == lowest).all().item<bool>()) {
        return true;
      }
    }
    const auto* source = node->inputs[0]->producer;
    if (is(source, "Clip")) {
      source = source->inputs[0]->producer;
    }
    // What was not negative before it was quantized is not negative afterwards: 0 is on the grid.
    return is(source, "QuantizeLinear") && same_parameters(source, node) && never_negative(source->inputs[0]);
  }
  return moves_values(node) && never_negative(node->inputs[0]);
}

}  // namespace

void drop_idle_relus(Model& model) {
  for (auto* node : model.nodes({"Relu"})) {
    if (never_negative(node->inputs[0])) {
      bypass(model, node, node->inputs[0]);
    }
  }
}

void mean_to_global_pool(Model& model) {
  for (auto* node : model.nodes({"ReduceMean"})) {
    auto* source = node->inputs[0];
    std::vector<int64_t> axes;
    if (const auto* given = node->input(1); given != nullptr && given->constant.defined()) {
      axes.assign(given->constant.const_data_ptr<int64_t>(),
                  given->constant.const_data_ptr<int64_t>() + given->constant.numel());
    }
    for (const auto& [name, value] : node->attributes) {
      axes = name == "axes" ? std::get<std::vector<int64_t>>(value) : axes;
    }
    for (auto& axis : axes) {
      axis += axis < 0 ? 4 : 0;
    }
    std::sort(axes.begin(), axes.end());
    if (!is_dequantized(source) || !source->has_shape || source->shape.size() != 4 ||
        axes != std::vector<int64_t>{2, 3}) {
      continue;
    }
    auto* output = node->outputs[0];
    auto* pooled =
        model.add_node(stem(node) + "GlobalAveragePool", "GlobalAveragePool", {source}, {}, source->dtype, 1, node)
            ->outputs[0];
    pooled->shape = {source->shape[0], source->shape[1], {1, 0}, {1, 0}};
    pooled->has_shape = true;
    if (node->integer("keepdims", 1) == 0) {
      pooled = add_like(model, node, stem(node) + "Flatten", "Flatten", {pooled}, source->dtype, output,
                        {{"axis", int64_t{1}}});
    }
    bypass(model, node, pooled);
  }
}

namespace {

/// A QuantizeLinear (with its Clip) and DequantizeLinear like `quantize`, on another tensor.
Value* pair_like(Model& model, const Node* before, const Node* quantize, Value* source) {
  const auto name = source->producer != nullptr ? source->producer->name : source->name;
  std::vector<Value*> inputs{source, quantize->inputs[1], quantize->inputs[2]};
  const auto integer = quantize->outputs[0]->dtype;
  auto* q = add_like(model, before, name + "/QuantizeLinear", "QuantizeLinear", inputs, integer, source);
  const auto* clip = quantize->outputs[0]->consumers.size() == 1 ? quantize->outputs[0]->consumers[0] : nullptr;
  if (is(clip, "Clip")) {
    q = add_like(model, before, name + "/Clip", "Clip", {q, clip->inputs[1], clip->inputs[2]}, integer, source);
  }
  inputs[0] = q;
  return add_like(model, before, name + "/DequantizeLinear", "DequantizeLinear", inputs, source->dtype, source);
}

}  // namespace

int64_t hoist_quantizers(Model& model) {
  int64_t hoisted = 0;
  std::vector<std::string_view> ops(kMovesValues.begin(), kMovesValues.end());
  ops.emplace_back("Concat");
  for (auto* node : model.nodes(ops)) {
    const auto* output = node->outputs[0];
    if (output->consumers.size() != 1 || !only_readers(model, output, "QuantizeLinear")) {
      continue;
    }
    const auto* quantize = output->consumers[0];
    if (is_per_channel(quantize)) {
      continue;
    }
    const size_t count = node->op == "Concat" ? node->inputs.size() : 1;
    for (size_t i = 0; i < count; ++i) {
      auto* source = node->inputs[i];
      const bool done = is_dequantized(source) && (count == 1 || same_parameters(source->producer, quantize));
      if (done || (count == 1 && source->producer == nullptr)) {
        continue;
      }
      model.set_input(node, i, pair_like(model, node, quantize, source));
      ++hoisted;
    }
  }
  return hoisted;
}

namespace {

/// What Relu or a float Clip with constant limits lets through; nothing for anything else.
std::optional<std::array<double, 2>> clip_limits(const Node* node) {
  constexpr auto infinity = std::numeric_limits<double>::infinity();
  if (is(node, "Relu")) {
    return std::array{0.0, infinity};
  }
  if (!at::isFloatingType(node->outputs[0]->dtype)) {
    return std::nullopt;
  }
  std::array<double, 2> limits{-infinity, infinity};
  for (size_t i = 0; i < 2; ++i) {
    if (const auto* value = node->input(i + 1)) {
      if (!value->constant.defined()) {
        return std::nullopt;
      }
      limits[i] = value->constant.item<double>();
    }
  }
  return limits;
}

using Limits = std::array<int64_t, 2>;

/// The smallest and the largest integer of a quantizer's type.
Limits type_limits(const Node* quantize) {
  switch (quantize->outputs[0]->dtype) {
    case at::kByte:
      return {0, 255};
    case at::kChar:
      return {-128, 127};
    case at::kShort:
      return {-32768, 32767};
    default:
      return {0, 65535};
  }
}

/// The integers that the limits of a clip become.
Limits integer_limits(const Node* quantize, const std::array<double, 2>& limits) {
  const auto scale = quantize->inputs[1]->constant.item<float>();
  const auto zero_point = quantize->inputs[2]->constant.to(at::kFloat).item<float>();
  const auto [lowest, highest] = type_limits(quantize);
  Limits out{};
  for (size_t i = 0; i < 2; ++i) {
    const auto quotient = std::nearbyint(static_cast<float>(limits[i]) / scale) + zero_point;
    out[i] = static_cast<int64_t>(std::clamp(quotient, static_cast<float>(lowest), static_cast<float>(highest)));
  }
  return out;
}

void limit_integers(Model& model, Node* quantize, const std::array<double, 2>& limits) {
  auto bounds = integer_limits(quantize, limits);
  auto* output = quantize->outputs[0];
  if (output->consumers.size() == 1 && is(output->consumers[0], "Clip") && !model.is_output(output)) {
    auto* clip = output->consumers[0];  // a range of fewer bits: intersect
    const auto low = clip->inputs[1]->constant.to(at::kLong).item<int64_t>();
    const auto high = clip->inputs[2]->constant.to(at::kLong).item<int64_t>();
    bounds = {std::clamp(bounds[0], low, high), std::clamp(bounds[1], low, high)};
    bypass(model, clip, output);
  }
  if (bounds == type_limits(quantize)) {
    return;
  }
  std::vector<Value*> inputs{output};
  for (size_t i = 0; i < 2; ++i) {
    inputs.push_back(
        model.add_constant(stem(quantize) + (i == 0 ? "min" : "max"),
                           at::full({}, bounds[i], at::TensorOptions().dtype(at::kLong)).to(output->dtype)));
  }
  auto* clipped =
      add_like(model, after(model, quantize), stem(quantize) + "Clip", "Clip", inputs, output->dtype, output);
  model.replace(output, clipped);
  model.set_input(clipped->producer, 0, output);
}

}  // namespace

void absorb_clipping(Model& model, bool integers) {
  for (auto* node : model.nodes({"Relu", "Clip"})) {
    if (node->removed) {
      continue;
    }
    const auto limits = clip_limits(node);
    auto* output = node->outputs[0];
    if (!limits.has_value() || !only_readers(model, output, "QuantizeLinear") ||
        std::any_of(output->consumers.begin(), output->consumers.end(), is_per_channel) ||
        !std::all_of(output->consumers.begin(), output->consumers.end(),
                     [](const Node* quantize) { return is_integral(quantize->outputs[0]); })) {
      continue;
    }
    const auto quantizers = output->consumers;
    const bool clips = integers && std::all_of(quantizers.begin(), quantizers.end(), [](const Node* quantize) {
                         return c10::elementSize(quantize->outputs[0]->dtype) == 1;
                       });
    if (!clips && !std::all_of(quantizers.begin(), quantizers.end(), [&](const Node* quantize) {
          return integer_limits(quantize, *limits) == type_limits(quantize);
        })) {
      continue;
    }
    for (auto* quantize : quantizers) {
      limit_integers(model, quantize, *limits);
      model.set_input(quantize, 0, node->inputs[0]);
    }
    model.remove(node);
  }
}

void keep_clipping(Model& model) {
  for (auto* node : model.nodes({"QuantizeLinear"})) {
    auto* clip = node->inputs[0]->producer;
    if (is_integral(node->outputs[0]) || !(is(clip, "Relu") || is(clip, "Clip"))) {
      continue;
    }
    auto* source = clip->inputs[0];
    auto* limited = source;
    if (is(clip, "Relu")) {
      auto* zero = model.add_constant(stem(clip) + "zero", at::full({}, 0.0f));
      limited = add_like(model, clip, stem(clip) + "Max", "Max", {limited, zero}, source->dtype, source);
    } else {
      for (const auto& [side, op] : {std::pair<size_t, const char*>{1, "Max"}, {2, "Min"}}) {
        if (auto* limit = clip->input(side)) {
          limited = add_like(model, clip, stem(clip) + op, op, {limited, limit}, source->dtype, source);
        }
      }
    }
    model.set_input(node, 0, limited);
  }
}

void split_linear_bias(Model& model) {
  for (auto* node : model.nodes({"MatMul"})) {
    auto* product = node->outputs[0];
    if (!is_dequantized(node->inputs[0]) || !is_dequantized(node->inputs[1]) || product->consumers.size() != 1 ||
        model.is_output(product) || !is(product->consumers[0], "Add")) {
      continue;
    }
    auto* add = product->consumers[0];
    auto* bias = add->inputs[add->inputs[0] == product ? 1 : 0];
    if (!bias->constant.defined() || bias->constant.dim() != 1 || !product->has_shape || product->shape.empty() ||
        (bias->constant.numel() != 1 && product->shape.back() != Dim{bias->constant.numel(), 0})) {
      continue;  // another constant would make the result wider than the product
    }
    auto* output = add->outputs[0];
    const bool to_gemm =
        product->shape.size() == 2 && output->consumers.size() == 1 && only_readers(model, output, "QuantizeLinear");
    const std::string op = to_gemm ? "Gemm" : "Sum";
    const auto inputs =
        to_gemm ? std::vector<Value*>{node->inputs[0], node->inputs[1], bias} : std::vector<Value*>{product, bias};
    bypass(model, add, add_like(model, add, stem(add) + op, op, inputs, output->dtype, output));
    if (to_gemm) {
      model.remove(node);
    }
  }
}

void widen_linear_bias(Model& model) {
  for (auto* node : model.nodes({"MatMul"})) {
    const auto* product = node->outputs[0];
    if (!is_dequantized(node->inputs[0]) || !is_dequantized(node->inputs[1]) || product->shape.size() < 3) {
      continue;
    }
    const auto readers = product->consumers;
    for (auto* add : readers) {
      const size_t other = add->inputs[0] == product ? 1 : 0;
      if (!is(add, "Add") || !add->inputs[other]->constant.defined() || add->inputs[other]->constant.dim() != 1) {
        continue;
      }
      std::vector<int64_t> sizes(product->shape.size(), 1);
      sizes.back() = -1;
      const auto* bias = add->inputs[other];
      model.set_input(add, other, model.add_constant(bias->name, bias->constant.reshape(sizes)));
    }
  }
}

void residual_to_sum(Model& model) {
  for (auto* node : model.nodes({"Add"})) {
    auto* output = node->outputs[0];
    if (std::any_of(output->consumers.begin(), output->consumers.end(),
                    [](const Node* reader) { return is(reader, "LayerNormalization"); }) &&
        !node->inputs[0]->constant.defined() && !node->inputs[1]->constant.defined()) {
      bypass(model, node, add_like(model, node, stem(node) + "Sum", "Sum", node->inputs, output->dtype, output));
    }
  }
}

void pack_int4(Model& model) {
  for (auto* node : model.nodes({"DequantizeLinear"})) {
    const auto *weight = node->inputs[0], *output = node->outputs[0];
    if (!weight->constant.defined() || weight->dtype != at::kChar || weight->constant.dim() != 2 ||
        weight->constant.numel() == 0 || !only_readers(model, output, "MatMul")) {
      continue;
    }
    const bool fits = weight->constant.min().item<int64_t>() >= -8 && weight->constant.max().item<int64_t>() <= 7;
    if (!fits || std::any_of(output->consumers.begin(), output->consumers.end(),
                             [](const Node* reader) { return is_dequantized(reader->inputs[0]); })) {
      continue;
    }
    for (size_t i = 0; i < node->inputs.size(); i += 2) {  // the weight, and its zero point where it has one
      const auto* whole = node->inputs[i];
      auto* packed = model.add_constant(whole->name + "_int4", whole->constant);
      packed->is_int4 = true;
      model.set_input(node, i, packed);
    }
  }
}

}  // namespace rarefy::onnx
