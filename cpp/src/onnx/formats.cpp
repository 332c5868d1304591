// What becomes of the operators of formats (rarefy/ops/formats.h, weight_formats.h) that round activations: their formulas in
// ONNX's operators. Weights are folded into their codes before (Translator::stored).
#include <ATen/ops/full.h>
#include <ATen/ops/tensor.h>
#include <ATen/ops/zeros.h>
#include <fmt/format.h>

#include <algorithm>
#include <cmath>

#include "onnx/translate.h"
#include "ops/minifloat.h"
#include "ops/qparams.h"

namespace rarefy::onnx {
namespace {

/// Node by node, with constants where numbers stand. Shapes of scales are not needed by anybody and stay unset.
struct Writer {
  Translator& t;

  Value* number(double value, at::ScalarType type = at::kFloat) const { return t.scalar(value, type); }
  Value* op(const char* name, std::vector<Value*> inputs) const { return t.emit(name, std::move(inputs)); }
  Value* is(const char* name, Value* a, Value* b) const { return t.emit(name, {a, b}, {}, at::kBool); }
  Value* where(Value* condition, Value* a, Value* b) const { return t.emit("Where", {condition, a, b}, {}, a->dtype); }
  Value* between(Value* x, double low, double high) const {
    return op("Min", {op("Max", {x, number(low, x->dtype)}), number(high, x->dtype)});
  }
};

/// An activation cut into what shares a scale: the axes to reduce, none for all.
struct Cut {
  Value* x;
  std::vector<int64_t> axes;
  Shape shape;   // of x
  Shape padded;  // before the cut; empty where none was made
  Shape original;
};

Cut cut(const Call& c, std::optional<int64_t> axis, const std::vector<int64_t>& block) {
  const auto shape = c.shape_of("x");
  auto* x = c.tensor("x");
  if (x->dtype != at::kFloat) {
    c.refuse("its input must be float32");
  }
  if (!axis.has_value()) {
    return {x, {}, shape, {}, shape};
  }
  const auto rank = static_cast<int64_t>(shape.size());
  const auto last = *axis < 0 ? *axis + rank : *axis;
  if (block.empty()) {
    std::vector<int64_t> others;
    for (int64_t i = 0; i < rank; ++i) {
      if (i != last) {
        others.push_back(i);
      }
    }
    return {x, others, shape, {}, shape};
  }
  if (block.size() == 1 && block[0] < 0) {
    return {x, {last}, shape, {}, shape};
  }
  Cut out{x, {}, {}, shape, shape};
  std::vector<int64_t> before(shape.size()), after(shape.size());
  for (int64_t i = 0; i < rank; ++i) {
    const auto at = static_cast<size_t>(i);
    const auto place = i - (last - static_cast<int64_t>(block.size()) + 1);
    if (place < 0 || i > last) {
      out.shape.push_back(shape[at]);
      continue;
    }
    if (!shape[at].is_fixed()) {
      c.refuse("blocks along an axis that follows the batch have no form in a file (dynamic_batch = false fixes it)");
    }
    const auto size = block[static_cast<size_t>(place)];
    const auto count = (shape[at].size + size - 1) / size;
    after[at] = count * size - shape[at].size;
    out.padded[at].size = count * size;
    out.shape.push_back({count, 0});
    out.axes.push_back(static_cast<int64_t>(out.shape.size()));
    out.shape.push_back({size, 0});
  }
  if (std::any_of(after.begin(), after.end(), [](int64_t size) { return size > 0; })) {
    auto pads = before;  // 0 widens no range of a block
    pads.insert(pads.end(), after.begin(), after.end());
    x = c.t.emit("Pad", {x, c.t.integers(pads), c.t.scalar(0.0, at::kFloat)}, {{"mode", std::string("constant")}});
    x->shape = out.padded;
    x->has_shape = true;
  }
  out.x = c.t.reshape(x, out.shape);
  return out;
}

Value* join(const Call& c, const Cut& pieces, Value* y) {
  if (pieces.padded.empty()) {
    return y;
  }
  y = c.t.reshape(y, pieces.padded);
  std::vector<int64_t> ends, axes;
  for (size_t i = 0; i < pieces.original.size(); ++i) {
    if (pieces.padded[i].is_fixed() && pieces.padded[i].size != pieces.original[i].size) {
      ends.push_back(pieces.original[i].size);
      axes.push_back(static_cast<int64_t>(i));
    }
  }
  if (!axes.empty()) {
    const std::vector<int64_t> starts(axes.size(), 0);
    y = c.t.emit("Slice", {y, c.t.integers(starts), c.t.integers(ends), c.t.integers(axes)});
  }
  return y;
}

Value* largest(const Call& c, const Cut& pieces) {
  return c.t.reduce("ReduceMax", c.t.emit("Abs", {pieces.x}), pieces.axes, /*keeps_axes=*/true);
}

/// The greatest power of two that is not above, of positive numbers; 2^-127 below 2^-126. Log may be wrong by one next to powers
/// of two, and is put right.
Value* down_to_power_of_two(const Writer& w, Value* x) {
  std::vector<float> powers;
  for (int e = -126; e <= 127; ++e) {
    powers.push_back(std::ldexp(1.0f, e));
  }
  auto* table = w.t.constant(at::tensor(powers), "powers_of_two");
  auto* safe = w.op("Max", {x, w.number(0x1p-126)});
  auto* exponent = w.op("Floor", {w.op("Mul", {w.op("Log", {safe}), w.number(1.4426950408889634)})});
  auto* place = w.t.cast(w.op("Add", {w.between(exponent, -126, 127), w.number(126)}), at::kLong);
  auto* power = w.t.emit("Gather", {table, place}, {{"axis", int64_t{0}}});
  auto* above = w.op("Mul", {power, w.number(2)});
  auto* below = w.op("Mul", {power, w.number(0.5)});
  return w.where(w.is("GreaterOrEqual", x, above), above, w.where(w.is("Less", x, power), below, power));
}

Value* up_to_power_of_two(const Writer& w, Value* x) {
  auto* power = down_to_power_of_two(w, x);
  return w.where(w.is("Greater", x, power), w.op("Mul", {power, w.number(2)}), power);
}

/// largest / greatest, at least the smallest scale, 1 where it is 0.
Value* scale_of_largest(const Writer& w, Value* found, double greatest, double reach) {
  auto* wanted = w.op("Div", {w.t.cast(found, at::kDouble), w.number(greatest, at::kDouble)});
  wanted = w.op("Min", {wanted, w.number(kLargestGridValue / reach, at::kDouble)});
  auto* scale = w.op("Max", {w.t.cast(wanted, at::kFloat), w.number(kSmallestScale)});
  return w.where(w.is("Equal", found, w.number(0)), w.number(1), scale);
}

/// y to the nearest number of a minifloat: the step between neighbours follows from the power of two below.
Value* to_minifloat(const Writer& w, Value* y, const ops::MinifloatShape& f) {
  auto* magnitude = w.op("Min", {w.op("Abs", {y}), w.number(std::ldexp(1.0, f.greatest_exponent() + 1))});
  const auto step_at = [&](int exponent) {
    return w.number(std::ldexp(1.0, exponent - static_cast<int>(f.mantissa_bits)));
  };
  Value* step = step_at(f.smallest_exponent());
  for (int e = f.smallest_exponent() + 1; e <= f.greatest_exponent(); ++e) {
    step = w.where(w.is("GreaterOrEqual", magnitude, w.number(std::ldexp(1.0, e))), step_at(e), step);
  }
  auto* rounded = w.op("Mul", {w.op("Round", {w.op("Div", {magnitude, step})}), step});
  if (f.saturate) {
    rounded = w.op("Min", {rounded, w.number(f.greatest())});
  } else {
    rounded = w.where(w.is("Greater", rounded, w.number(f.greatest())), w.number(f.overflow()), rounded);
  }
  return w.op("Mul", {rounded, w.op("Sign", {y})});
}

/// The values of a minifloat by a Cast, where ONNX has the type and runtimes compute with it.
Value* by_cast(const Writer& w, Value* y, const ops::MinifloatShape& f) {
  const bool is_e4m3 = f.exponent_bits == 4;
  auto* inside = w.between(y, -f.greatest(), f.greatest());
  return w.t.cast(w.t.cast(inside, is_e4m3 ? at::kFloat8_e4m3fn : at::kFloat8_e5m2), at::kFloat);
}

bool has_type(const ops::MinifloatShape& f) {
  using Specials = ops::MinifloatShape::Specials;
  const bool e4m3 = f.exponent_bits == 4 && f.mantissa_bits == 3 && f.bias == 7 && f.specials == Specials::nan;
  const bool e5m2 = f.exponent_bits == 5 && f.mantissa_bits == 2 && f.bias == 15 && f.specials == Specials::ieee;
  return (e4m3 || e5m2) && f.saturate;
}

Value* round_minifloat(const Writer& w, Value* y, const ops::MinifloatShape& f) {
  return has_type(f) && w.t.opset() >= 19 ? by_cast(w, y, f) : to_minifloat(w, y, f);
}

std::optional<int64_t> axis_of(const Call& c) {
  return c.has("axis") ? std::optional(c.integer("axis")) : std::nullopt;
}

/// A constant scale beside the pieces.
Value* constant_scale(const Call& c, const Cut& pieces, const at::Tensor& scale) {
  if (pieces.axes.empty() || scale.numel() == 1) {
    return c.t.constant(scale.reshape({}).to(at::kFloat), "scale");
  }
  std::vector<int64_t> sizes(pieces.shape.size());
  for (size_t i = 0; i < sizes.size(); ++i) {
    sizes[i] = pieces.shape[i].size;
  }
  for (const auto axis : pieces.axes) {
    sizes[static_cast<size_t>(axis)] = 1;
  }
  return c.t.constant(scale.reshape(sizes).to(at::kFloat), "scale");
}

void refuse_random(const Call& c) {
  if (c.has("seed")) {
    c.refuse("ONNX has no operator that draws the numbers of stochastic rounding; round to nearest");
  }
}

at::Tensor scale_of(const Call& c) {
  const auto scale = c.constant("scale");
  if (!scale.defined()) {
    c.refuse("the scale must not depend on the input");
  }
  return scale;
}

ops::MinifloatShape minifloat_of(const Call& c, bool saturate) {
  return ops::minifloat_shape("export_onnx", c.integer("exponent_bits"), c.integer("mantissa_bits"), c.integer("bias"),
                              c.text("specials"), saturate);
}

/// One scale, or one per channel, that was observed: the quantizer of an ordinary grid.
std::vector<Value*> fake_quantize_group(const Call& c) {
  refuse_random(c);
  const auto block = c.integers("block");
  const auto scale = scale_of(c), zero_point = c.constant("zero_point");
  if (!zero_point.defined()) {
    c.refuse("the zero point must not depend on the input");
  }
  if (!block.empty()) {
    c.refuse("observed scales of activations are per tensor or channel in a file");
  }
  return {quantize_on_grid(c, scale, zero_point, axis_of(c), c.integer("qmin"), c.integer("qmax"))};
}

std::vector<Value*> fake_quantize_dynamic(const Call& c) {
  const Writer w{c.t};
  const auto pieces = cut(c, axis_of(c), c.integers("block"));
  const auto qmin = c.integer("qmin"), qmax = c.integer("qmax");
  const int64_t middle = (qmin + qmax + 1) >> 1;
  Value *scale = nullptr, *zero_point = nullptr;
  if (c.flag("symmetric")) {
    scale =
        scale_of_largest(w, largest(c, pieces), static_cast<double>(qmax - middle), static_cast<double>(middle - qmin));
    scale = c.flag("power_of_two") ? up_to_power_of_two(w, scale) : scale;
    zero_point = middle == 0 ? nullptr : w.number(static_cast<double>(middle));
  } else {
    auto* low = w.op("Min", {c.t.reduce("ReduceMin", pieces.x, pieces.axes, true), w.number(0)});
    auto* high = w.op("Max", {c.t.reduce("ReduceMax", pieces.x, pieces.axes, true), w.number(0)});
    low = c.t.cast(low, at::kDouble);
    high = c.t.cast(high, at::kDouble);
    const auto reach = static_cast<double>(qmax - qmin);
    auto* width = w.op("Sub", {high, low});
    auto* wanted = w.op("Div", {width, w.number(reach, at::kDouble)});
    wanted = w.op("Min", {wanted, w.number(kLargestGridValue / reach, at::kDouble)});
    scale = w.op("Max", {c.t.cast(wanted, at::kFloat), w.number(kSmallestScale)});
    scale = w.where(w.is("Equal", width, w.number(0, at::kDouble)), w.number(1), scale);
    auto* offset = w.op("Round", {w.op("Div", {low, c.t.cast(scale, at::kDouble)})});
    zero_point = w.op("Sub", {w.number(static_cast<double>(qmin), at::kDouble), offset});
    zero_point = c.t.cast(w.between(zero_point, static_cast<double>(qmin), static_cast<double>(qmax)), at::kFloat);
  }
  auto* q = w.op("Round", {w.op("Div", {pieces.x, scale})});
  q = zero_point == nullptr ? q : w.op("Add", {q, zero_point});
  q = w.between(q, static_cast<double>(qmin), static_cast<double>(qmax));
  q = zero_point == nullptr ? q : w.op("Sub", {q, zero_point});
  return {join(c, pieces, w.op("Mul", {q, scale}))};
}

std::vector<Value*> cast_minifloat(const Call& c) {
  refuse_random(c);
  const Writer w{c.t};
  const auto f = minifloat_of(c, c.flag("saturate"));
  const auto scale = scale_of(c);
  const auto block = c.integers("block");
  if (has_type(f) && c.t.opset() >= 19 && block.empty()) {
    auto* x = c.tensor("x");
    if (x->dtype != at::kFloat) {
      c.refuse("its input must be float32");
    }
    const auto axis = axis_of(c);
    const auto type = f.exponent_bits == 4 ? at::kFloat8_e4m3fn : at::kFloat8_e5m2;
    auto* steps = c.t.constant(axis ? scale : scale.reshape({}), "scale");
    auto* zero = c.t.constant(at::zeros(axis ? scale.sizes() : at::IntArrayRef{}, at::kFloat).to(type), "zero_point");
    const Attributes attributes = axis ? Attributes{{"axis", *axis}} : Attributes{};
    auto* q = c.t.emit("QuantizeLinear", {x, steps, zero}, attributes, type);
    q->shape = x->shape;
    q->has_shape = x->has_shape;
    return {c.t.emit("DequantizeLinear", {q, steps, zero}, attributes, at::kFloat)};
  }
  const auto pieces = cut(c, axis_of(c), block);
  auto* s = constant_scale(c, pieces, scale);
  auto* y = round_minifloat(w, w.op("Div", {pieces.x, s}), f);
  return {join(c, pieces, w.op("Mul", {y, s}))};
}

std::vector<Value*> cast_minifloat_dynamic(const Call& c) {
  const Writer w{c.t};
  const auto f = minifloat_of(c, true);
  const auto pieces = cut(c, axis_of(c), c.integers("block"));
  auto* s = scale_of_largest(w, largest(c, pieces), f.greatest(), f.greatest());
  s = c.flag("power_of_two") ? up_to_power_of_two(w, s) : s;
  auto* y = round_minifloat(w, w.op("Div", {pieces.x, s}), f);
  return {join(c, pieces, w.op("Mul", {y, s}))};
}

std::vector<Value*> fake_quantize_mx(const Call& c) {
  const Writer w{c.t};
  const auto f = ops::mx_shape("export_onnx", c.text("element"));
  const auto pieces = cut(c, c.integer("axis"), {c.integer("block")});
  auto* found = largest(c, pieces);
  auto* s = w.op("Mul", {down_to_power_of_two(w, found), w.number(std::ldexp(1.0, -f.greatest_exponent()))});
  s = w.op("Max", {s, w.number(0x1p-127)});
  s = w.where(w.is("Equal", found, w.number(0)), w.number(1), s);
  auto* y = round_minifloat(w, w.op("Div", {pieces.x, s}), f);
  return {join(c, pieces, w.op("Mul", {y, s}))};
}

std::vector<Value*> fake_quantize_nvfp4(const Call& c) {
  const Writer w{c.t};
  if (c.has("tensor_scale")) {
    c.refuse("the tensor's scale must follow from the tensor");
  }
  const auto pieces = cut(c, c.integer("axis"), {c.integer("block")});
  auto* found = largest(c, pieces);
  auto* whole = scale_of_largest(w, c.t.reduce("ReduceMax", found, {}, true), 6.0 * 448.0, 6.0 * 448.0);
  auto* limit = w.op("Mul", {c.t.cast(whole, at::kDouble), w.number(6, at::kDouble)});
  auto* wanted = c.t.cast(w.op("Div", {c.t.cast(found, at::kDouble), limit}), at::kFloat);
  auto* by_block = w.op("Max", {round_minifloat(w, wanted, ops::e4m3_shape()), w.number(0x1p-9)});
  auto* s = w.op("Mul", {by_block, whole});
  auto* y = to_minifloat(w, w.op("Div", {pieces.x, s}), ops::e2m1_shape());
  return {join(c, pieces, w.op("Mul", {y, s}))};
}

Rule only_weights(const char* what) {
  return [what](const Call& c) -> std::vector<Value*> {
    c.refuse(fmt::format("{} is a format of weights: ONNX has no operator that rounds activations to it", what));
  };
}

}  // namespace

void add_format_rules(Rules& rules) {
  rules["rarefy::fake_quantize_group"] = fake_quantize_group;
  rules["rarefy::fake_quantize_dynamic"] = fake_quantize_dynamic;
  rules["rarefy::cast_minifloat"] = cast_minifloat;
  rules["rarefy::cast_minifloat_dynamic"] = cast_minifloat_dynamic;
  rules["rarefy::fake_quantize_mx"] = fake_quantize_mx;
  rules["rarefy::fake_quantize_nvfp4"] = fake_quantize_nvfp4;
  rules["rarefy::fake_quantize_nf4"] = only_weights("NF4");
  rules["rarefy::fake_quantize_binary"] = only_weights("binary");
  rules["rarefy::fake_quantize_ternary"] = only_weights("ternary");
  rules["rarefy::fake_quantize_codebook"] = only_weights("a codebook");
}

}  // namespace rarefy::onnx
