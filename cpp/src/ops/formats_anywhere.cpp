// The operators of formats on devices without kernels of their own: the same formulas from torch's operators. They agree with
// the CPU's bit by bit, where the device divides and rounds as IEEE 754 has it and torch does not flush denormals.
#include <ATen/ops/empty_like.h>
#include <ATen/ops/frexp.h>
#include <ATen/ops/full.h>
#include <ATen/ops/full_like.h>
#include <ATen/ops/maximum.h>
#include <ATen/ops/ones_like.h>
#include <ATen/ops/searchsorted.h>
#include <ATen/ops/tensor.h>
#include <ATen/ops/where.h>
#include <ATen/ops/zeros_like.h>
#include <rarefy/ops/formats.h>
#include <torch/library.h>

#include "ops/block_views.h"
#include "ops/nf4.h"
#include "ops/qparams.h"

namespace rarefy::ops {
namespace {

at::ScalarType computing_type(const at::Tensor& x) { return x.scalar_type() == at::kDouble ? at::kDouble : at::kFloat; }

/// A parameter as a column beside to_blocks(x).
at::Tensor column(const at::Tensor& parameter, const at::Tensor& x) {
  return parameter.reshape({-1, 1}).to(computing_type(x));
}

at::Tensor blocks_of(const at::Tensor& x, const Sharing& sharing) {
  return to_blocks(x.to(computing_type(x)), sharing, 0.0);
}

at::Tensor put_back(const at::Tensor& blocks, const at::Tensor& x, const Sharing& sharing) {
  return at::empty_like(x).copy_(from_blocks(blocks, x, sharing));
}

at::Tensor uniform_noise(const char* function) {
  TORCH_CHECK_NOT_IMPLEMENTED(false, "[", function, "] rounds stochastically on the CPU alone");
}

/// The nearest number of a minifloat for each value.
at::Tensor to_minifloat(const at::Tensor& y, const MinifloatShape& shape) {
  const auto magnitude = y.abs().clamp_max(std::ldexp(1.0, shape.greatest_exponent() + 1));
  // frexp gives exponents of significands in [1/2, 1).
  const auto exponent = std::get<1>(at::frexp(magnitude)).sub(1).clamp_min(shape.smallest_exponent());
  const auto step = powers_of_two(exponent.sub(shape.mantissa_bits)).to(magnitude.scalar_type());
  auto rounded = (magnitude / step).round() * step;
  rounded = at::where(rounded > shape.greatest(), at::full_like(rounded, shape.overflow()), rounded);
  return at::where(y.isnan(), y, rounded.copysign(y));
}

at::Tensor fake_quantize_group_any(const at::Tensor& x, const at::Tensor& scale, const at::Tensor& zero_point,
                                   std::optional<int64_t> axis, c10::SymIntArrayRef block, int64_t qmin, int64_t qmax,
                                   bool, const std::optional<at::Tensor>& seed) {
  const auto sharing = check_group("fake_quantize_group", x, scale, zero_point, axis, block, qmin, qmax);
  if (seed.has_value()) {
    return uniform_noise("fake_quantize_group");
  }
  const auto s = column(scale, x), z = column(zero_point, x);
  const auto q = ((blocks_of(x, sharing) / s).round() + z).clamp(qmin, qmax);
  return put_back((q - z) * s, x, sharing);
}

at::Tensor cast_minifloat_any(const at::Tensor& x, const at::Tensor& scale, std::optional<int64_t> axis,
                              c10::SymIntArrayRef block, int64_t exponent_bits, int64_t mantissa_bits, int64_t bias,
                              c10::string_view specials, bool saturate, bool, const std::optional<at::Tensor>& seed) {
  const auto sharing = check_sharing("cast_minifloat", x, axis, block);
  check_scale("cast_minifloat", x, sharing, scale);
  const auto shape = minifloat_shape("cast_minifloat", exponent_bits, mantissa_bits, bias, specials, saturate);
  if (seed.has_value()) {
    return uniform_noise("cast_minifloat");
  }
  const auto s = column(scale, x);
  return put_back(to_minifloat(blocks_of(x, sharing) / s, shape) * s, x, sharing);
}

at::Tensor fake_quantize_group_backward_any(const at::Tensor& grad, const at::Tensor& x, const at::Tensor& scale,
                                            const at::Tensor& zero_point, std::optional<int64_t> axis,
                                            c10::SymIntArrayRef block, int64_t qmin, int64_t qmax) {
  const auto sharing = check_group("fake_quantize_group_backward", x, scale, zero_point, axis, block, qmin, qmax);
  check_same_input("fake_quantize_group_backward", grad, x);
  const auto q = (blocks_of(x, sharing) / column(scale, x)).round() + column(zero_point, x);
  const auto inside = from_blocks(q.ge(qmin).logical_and(q.le(qmax)), x, sharing);
  return at::empty_like(x).copy_(at::where(inside, grad, at::zeros_like(grad)));
}

at::Tensor cast_minifloat_backward_any(const at::Tensor& grad, const at::Tensor& x, const at::Tensor& scale,
                                       std::optional<int64_t> axis, c10::SymIntArrayRef block, int64_t exponent_bits,
                                       int64_t mantissa_bits, int64_t bias, c10::string_view specials) {
  const auto sharing = check_sharing("cast_minifloat_backward", x, axis, block);
  check_scale("cast_minifloat_backward", x, sharing, scale);
  check_same_input("cast_minifloat_backward", grad, x);
  const auto shape = minifloat_shape("cast_minifloat_backward", exponent_bits, mantissa_bits, bias, specials, true);
  const double last =
      computing_type(x) == at::kDouble ? shape.last_inside<double>() : static_cast<double>(shape.last_inside<float>());
  const auto inside = from_blocks((blocks_of(x, sharing) / column(scale, x)).abs().le(last), x, sharing);
  return at::empty_like(x).copy_(at::where(inside, grad, at::zeros_like(grad)));
}

// --- Scales from x ------------------------------------------------------------------------------------------------------

constexpr double kInfinity = std::numeric_limits<double>::infinity();

std::pair<at::Tensor, at::Tensor> ranges(const at::Tensor& x, const Sharing& sharing) {
  const auto finite = x.to(at::kFloat) + 0.0;  // -0 becomes 0
  const auto is_finite = finite.isfinite();
  const auto low = at::where(is_finite, finite, at::full_like(finite, kInfinity));
  const auto high = at::where(is_finite, finite, at::full_like(finite, -kInfinity));
  const auto sizes = scale_sizes(x, sharing);
  if (x.sym_numel() == 0) {
    return {at::full_symint(sizes, kInfinity, finite.options()), at::full_symint(sizes, -kInfinity, finite.options())};
  }
  return {to_blocks(low, sharing, kInfinity).amin(1).reshape_symint(sizes),
          to_blocks(high, sharing, -kInfinity).amax(1).reshape_symint(sizes)};
}

/// The largest finite magnitude of each block, 0 where there is none.
at::Tensor largest_of(const at::Tensor& x, const Sharing& sharing) {
  const auto [low, high] = ranges(x, sharing);
  return at::maximum(-low, high).clamp_min(0.0);
}

at::Tensor up_to_power_of_two(const at::Tensor& scale) {
  const auto [significand, exponent] = at::frexp(scale);
  return powers_of_two(exponent - significand.eq(0.5).to(exponent.scalar_type()));
}

at::Tensor scale_of_largest(const at::Tensor& largest, double greatest) {
  const auto scale = (largest.to(at::kDouble) / greatest)
                         .clamp_max(kLargestGridValue / greatest)
                         .to(at::kFloat)
                         .clamp_min(kSmallestScale);
  return at::where(largest.eq(0.0), at::ones_like(scale), scale);
}

std::tuple<at::Tensor, at::Tensor> group_qparams_any(const at::Tensor& x, std::optional<int64_t> axis,
                                                     c10::SymIntArrayRef block, int64_t qmin, int64_t qmax,
                                                     bool symmetric, bool power_of_two) {
  constexpr auto function = "group_qparams";
  const auto sharing = check_sharing(function, x, axis, block);
  check_range(function, qmin, qmax);
  check_symmetric(function, qmin, qmax, symmetric);
  TORCH_CHECK_VALUE(symmetric || !power_of_two, "[", function,
                    "] power_of_two needs a fixed zero point: symmetric must be true, got false");
  // range_to_qparams of ops/qparams.h.
  const auto [least, most] = ranges(x, sharing);
  const auto low = least.to(at::kDouble).clamp_max(0.0), high = most.to(at::kDouble).clamp_min(0.0);
  const int64_t middle = (qmin + qmax + 1) >> 1;
  const auto reach = static_cast<double>(symmetric ? middle - qmin : qmax - qmin);
  const auto wanted = symmetric ? at::maximum(-low, high) / static_cast<double>(qmax - middle)
                                : (high - low) / static_cast<double>(qmax - qmin);
  auto scale = wanted.clamp_max(kLargestGridValue / reach).to(at::kFloat).clamp_min(kSmallestScale);
  scale = at::where(low.eq(high), at::ones_like(scale), scale);
  auto zero_point = at::full_like(scale, middle);
  if (!symmetric) {
    zero_point = (static_cast<double>(qmin) - (low / scale.to(at::kDouble)).round()).clamp(qmin, qmax);
  }
  return {power_of_two ? up_to_power_of_two(scale) : scale, zero_point.to(at::kInt)};
}

at::Tensor fake_quantize_dynamic_any(const at::Tensor& x, std::optional<int64_t> axis, c10::SymIntArrayRef block,
                                     int64_t qmin, int64_t qmax, bool symmetric, bool power_of_two) {
  const auto [scale, zero_point] = group_qparams_any(x, axis, block, qmin, qmax, symmetric, power_of_two);
  return fake_quantize_group_any(x, scale, zero_point, axis, block, qmin, qmax, true, std::nullopt);
}

at::Tensor minifloat_scale_any(const at::Tensor& x, std::optional<int64_t> axis, c10::SymIntArrayRef block,
                               int64_t exponent_bits, int64_t mantissa_bits, int64_t bias, c10::string_view specials,
                               bool power_of_two) {
  const auto shape = minifloat_shape("minifloat_scale", exponent_bits, mantissa_bits, bias, specials, true);
  const auto scale =
      scale_of_largest(largest_of(x, check_sharing("minifloat_scale", x, axis, block)), shape.greatest());
  return power_of_two ? up_to_power_of_two(scale) : scale;
}

at::Tensor cast_minifloat_dynamic_any(const at::Tensor& x, std::optional<int64_t> axis, c10::SymIntArrayRef block,
                                      int64_t exponent_bits, int64_t mantissa_bits, int64_t bias,
                                      c10::string_view specials, bool power_of_two) {
  const auto scale = minifloat_scale_any(x, axis, block, exponent_bits, mantissa_bits, bias, specials, power_of_two);
  return cast_minifloat_any(x, scale, axis, block, exponent_bits, mantissa_bits, bias, specials, true, true,
                            std::nullopt);
}

Sharing along(const char* function, const at::Tensor& x, int64_t block, int64_t axis) {
  const c10::SymInt size(block);
  return check_sharing(function, x, axis, {size});
}

at::Tensor mx_scale_any(const at::Tensor& x, c10::string_view element, int64_t block, int64_t axis) {
  const auto shape = mx_shape("mx_scale", element);
  const auto largest = largest_of(x, along("mx_scale", x, block, axis));
  const auto exponent = std::get<1>(at::frexp(largest)).sub(1 + shape.greatest_exponent()).clamp(-127, 127);
  const auto scale = powers_of_two(exponent);
  return at::where(largest.eq(0.0), at::ones_like(scale), scale);
}

at::Tensor cast_any(const at::Tensor& x, const at::Tensor& scale, const Sharing& sharing, const MinifloatShape& shape) {
  const auto s = column(scale, x);
  return put_back(to_minifloat(blocks_of(x, sharing) / s, shape) * s, x, sharing);
}

at::Tensor fake_quantize_mx_any(const at::Tensor& x, c10::string_view element, int64_t block, int64_t axis) {
  const auto sharing = along("fake_quantize_mx", x, block, axis);
  return cast_any(x, mx_scale_any(x, element, block, axis), sharing, mx_shape("fake_quantize_mx", element));
}

at::Tensor nvfp4_tensor_scale_any(const at::Tensor& x) {
  return scale_of_largest(largest_of(x, check_sharing("nvfp4_tensor_scale", x, std::nullopt, {})), 6.0 * 448.0);
}

at::Tensor nvfp4_scale_any(const at::Tensor& x, const at::Tensor& tensor_scale, int64_t block, int64_t axis) {
  const auto largest = largest_of(x, along("nvfp4_scale", x, block, axis));
  const auto wanted = (largest.to(at::kDouble) / (6.0 * tensor_scale.to(at::kDouble))).to(at::kFloat);
  return to_minifloat(wanted, e4m3_shape()).clamp_min(0x1p-9);
}

at::Tensor fake_quantize_nvfp4_any(const at::Tensor& x, const std::optional<at::Tensor>& tensor_scale, int64_t block,
                                   int64_t axis) {
  const auto sharing = along("fake_quantize_nvfp4", x, block, axis);
  const auto given = tensor_scale.has_value() ? *tensor_scale : nvfp4_tensor_scale_any(x);
  return cast_any(x, nvfp4_scale_any(x, given, block, axis) * given, sharing, e2m1_shape());
}

at::Tensor nf4_scale_any(const at::Tensor& x, int64_t block, int64_t scale_block, int64_t axis) {
  TORCH_CHECK_VALUE(scale_block >= 0, "[nf4_scale] scale_block must not be negative, got ", scale_block);
  const auto largest = largest_of(x, along("nf4_scale", x, block, axis));
  const auto scale = at::where(largest.eq(0.0), at::ones_like(largest), largest.clamp_min(kSmallestScale));
  if (scale_block == 0 || scale.sym_numel() == 0) {
    return scale;
  }
  const auto mean = scale.to(at::kDouble).mean().to(at::kFloat);
  const c10::SymInt size(scale_block);
  const auto flat = scale.reshape(-1);
  const auto blocks = check_sharing("nf4_scale", flat, 0, {size});
  const auto deviations = to_blocks(flat - mean, blocks, 0.0);
  const auto step = scale_of_largest(deviations.abs().amax(1, /*keepdim=*/true), 127.0);
  const auto q = (deviations / step).round().clamp(-127, 127);
  return from_blocks((q * step + mean).clamp_min(kSmallestScale), flat, blocks).reshape_symint(scale.sym_sizes());
}

at::Tensor fake_quantize_nf4_any(const at::Tensor& x, int64_t block, int64_t scale_block, int64_t axis) {
  const auto sharing = along("fake_quantize_nf4", x, block, axis);
  const auto s = column(nf4_scale_any(x, block, scale_block, axis), x);
  const auto type = computing_type(x);
  const auto options = x.options().dtype(type);
  const auto list = [&](const auto& values) {
    return at::tensor(at::ArrayRef<float>(values.data(), values.size()), at::kFloat).to(options);
  };
  const auto y = blocks_of(x, sharing) / s;
  const auto codes = at::searchsorted(list(kNormalFloatBounds), y.contiguous());
  const auto values = list(kNormalFloat).index_select(0, codes.reshape(-1)).reshape_symint(y.sym_sizes());
  return put_back(at::where(y.isnan(), y, values * s), x, sharing);
}

std::tuple<at::Tensor, at::Tensor> block_range_any(const at::Tensor& x, std::optional<int64_t> axis,
                                                   c10::SymIntArrayRef block) {
  return ranges(x, check_sharing("block_range", x, axis, block));
}

}  // namespace

TORCH_LIBRARY_IMPL(rarefy, CompositeExplicitAutograd, m) {
  m.impl("fake_quantize_group", &fake_quantize_group_any);
  m.impl("cast_minifloat", &cast_minifloat_any);
  m.impl("fake_quantize_group_backward", &fake_quantize_group_backward_any);
  m.impl("cast_minifloat_backward", &cast_minifloat_backward_any);
  m.impl("group_qparams", &group_qparams_any);
  m.impl("fake_quantize_dynamic", &fake_quantize_dynamic_any);
  m.impl("minifloat_scale", &minifloat_scale_any);
  m.impl("cast_minifloat_dynamic", &cast_minifloat_dynamic_any);
  m.impl("mx_scale", &mx_scale_any);
  m.impl("fake_quantize_mx", &fake_quantize_mx_any);
  m.impl("nvfp4_tensor_scale", &nvfp4_tensor_scale_any);
  m.impl("nvfp4_scale", &nvfp4_scale_any);
  m.impl("fake_quantize_nvfp4", &fake_quantize_nvfp4_any);
  m.impl("nf4_scale", &nf4_scale_any);
  m.impl("fake_quantize_nf4", &fake_quantize_nf4_any);
  m.impl("block_range", &block_range_any);
}

}  // namespace rarefy::ops
