#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/maximum.h>
#include <ATen/ops/minimum.h>
#include <ATen/ops/where.h>
#include <rarefy/ops/accumulator.h>
#include <torch/library.h>

#include <cmath>

#include "ops/block_views.h"

TORCH_LIBRARY_FRAGMENT(rarefy, m) {
  m.def("a2q_limit(int accumulator_bits, int input_bits, bool input_signed) -> float");
  m.def(
      "fake_quantize_a2q(Tensor x, Tensor scale, int? axis, int qmin, int qmax, int accumulator_bits, int input_bits, "
      "bool input_signed) -> Tensor");
  m.def("accumulator_range(Tensor weight, int? axis, int low, int high) -> (Tensor, Tensor)");
  m.def("check_accumulator(Tensor weight, int? axis, int low, int high, int bits) -> ()");
}

namespace rarefy::ops {

double a2q_limit(int64_t accumulator_bits, int64_t input_bits, bool input_signed) {
  TORCH_CHECK_VALUE(accumulator_bits >= 2 && accumulator_bits <= 64,
                    "[a2q_limit] accumulator_bits must be in 2..64, got ", accumulator_bits);
  TORCH_CHECK_VALUE(input_bits >= 1 && input_bits <= 16, "[a2q_limit] input_bits must be in 1..16, got ", input_bits);
  const double largest = std::ldexp(1.0, static_cast<int>(accumulator_bits - 1)) - 1.0;
  return std::ldexp(largest, static_cast<int>((input_signed ? 1 : 0) - input_bits));
}

at::Tensor fake_quantize_a2q(const at::Tensor& x, const at::Tensor& scale, std::optional<int64_t> axis, int64_t qmin,
                             int64_t qmax, int64_t accumulator_bits, int64_t input_bits, bool input_signed) {
  constexpr auto function = "fake_quantize_a2q";
  const auto sharing = check_sharing(function, x, axis, {});
  check_scale(function, x, sharing, scale);
  check_range(function, qmin, qmax);
  TORCH_CHECK_VALUE(qmin <= 0 && qmax >= 0, "[", function, "] the range must hold 0, got [", qmin, ", ", qmax, "]");
  const double limit = (1.0 - std::ldexp(1.0, -20)) * a2q_limit(accumulator_bits, input_bits, input_signed);
  const auto type = x.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
  const auto s = scale.detach().reshape({-1, 1}).to(type);
  const auto scaled = to_blocks(x.to(type), sharing, 0.0) / s;
  const auto sum = scaled.abs().sum(1, /*keepdim=*/true, at::kDouble);
  const auto factor = (limit / sum.clamp_min(limit)).to(type);
  // 1 exactly where the sum is within the limit.
  const auto y = scaled * factor;
  const auto whole = y.detach().trunc();
  const auto inside = whole.ge(qmin).logical_and(whole.le(qmax));
  const auto passing = at::where(inside, y * s, (y * s).detach());
  // The second summand is 0; it has the gradient.
  const auto value = whole.clamp(qmin, qmax) * s + (passing - passing.detach());
  return from_blocks(value, x, sharing).to(x.scalar_type());
}

std::tuple<at::Tensor, at::Tensor> accumulator_range(const at::Tensor& weight, std::optional<int64_t> axis, int64_t low,
                                                     int64_t high) {
  constexpr auto function = "accumulator_range";
  TORCH_CHECK_TYPE(at::isIntegralType(weight.scalar_type(), /*includeBool=*/false), "[", function,
                   "] weight must be of an integer type, got ", weight.scalar_type());
  TORCH_CHECK_VALUE(low <= high, "[", function, "] low must not be above high, got ", low, " and ", high);
  const Sharing sharing{resolve_axis(function, weight, axis), {}};
  const auto rows = to_blocks(weight.to(at::kLong), sharing, 0.0);
  const auto at_low = rows * low, at_high = rows * high;
  // A partial sum has any subset of the products.
  return {at::minimum(at_low, at_high).clamp_max(0).sum(1), at::maximum(at_low, at_high).clamp_min(0).sum(1)};
}

void check_accumulator(const at::Tensor& weight, std::optional<int64_t> axis, int64_t low, int64_t high, int64_t bits) {
  TORCH_CHECK_VALUE(bits >= 2 && bits <= 62, "[check_accumulator] bits must be in 2..62, got ", bits);
  const auto [least, greatest] = accumulator_range(weight, axis, low, high);
  const int64_t largest = (int64_t{1} << (bits - 1)) - 1;
  const auto mins = least.cpu().contiguous(), maxs = greatest.cpu().contiguous();
  for (int64_t c = 0; c < mins.numel(); ++c) {
    const auto from = mins.const_data_ptr<int64_t>()[c], to = maxs.const_data_ptr<int64_t>()[c];
    TORCH_CHECK_VALUE(from >= -largest - 1 && to <= largest, "[check_accumulator] sums must be within ", bits,
                      " bits, [", -largest - 1, ", ", largest, "], got [", from, ", ", to, "] for channel ", c);
  }
}

TORCH_LIBRARY_IMPL(rarefy, CompositeImplicitAutograd, m) {
  m.impl("fake_quantize_a2q", &fake_quantize_a2q);
  m.impl("accumulator_range", &accumulator_range);
}

TORCH_LIBRARY_IMPL(rarefy, CompositeExplicitAutograd, m) { m.impl("check_accumulator", &check_accumulator); }
// Without a tensor there is no backend to choose.
TORCH_LIBRARY_IMPL(rarefy, CatchAll, m) { m.impl("a2q_limit", &a2q_limit); }

}  // namespace rarefy::ops
