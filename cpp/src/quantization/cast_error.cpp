#include "quantization/cast_error.h"

#include <ATen/ops/full.h>
#include <ATen/ops/maximum.h>
#include <ATen/ops/ones.h>
#include <ATen/ops/ones_like.h>
#include <ATen/ops/tensor.h>
#include <ATen/ops/where.h>
#include <ATen/ops/zeros.h>
#include <ATen/ops/zeros_like.h>
#include <c10/core/SymInt.h>
#include <rarefy/ops/formats.h>

#include <cmath>
#include <limits>
#include <vector>

#include "ops/cpu/cast_search.h"

namespace rarefy::quantization {

CastError::CastError(const Minifloat& format, bool power_of_two, double norm, double clip_weight)
    : format_(format),
      power_of_two_(power_of_two),
      norm_(norm),
      clip_weight_(clip_weight),
      specials_(str(format.specials)) {}

at::Tensor CastError::scale(const at::Tensor& end) const {
  return ops::minifloat_scale(end.unsqueeze(1), 0, {}, format_.exponent_bits, format_.mantissa_bits, format_.bias,
                              specials_, power_of_two_);
}

at::Tensor CastError::operator()(const at::Tensor& x, const at::Tensor& weights, const at::Tensor& end) const {
  const auto scales = scale(end);
  const auto rounded = ops::cast_minifloat(x, scales, 0, {}, format_.exponent_bits, format_.mantissa_bits, format_.bias,
                                           specials_, format_.saturate);
  const auto distance = (x - rounded).abs();
  auto error = norm_ == 2.0 ? distance * distance : distance.pow(norm_);
  if (clip_weight_ != 1.0) {
    // What clamping costs beyond the half step that rounding may.
    const double greatest = format_.greatest();
    const double half = std::ldexp(0.5, static_cast<int>(format_.greatest_exponent() - format_.mantissa_bits));
    const auto column = scales.unsqueeze(1);
    const auto beyond = (error - (column * half).square()).clamp_min(0.0) * (clip_weight_ - 1.0);
    error = error + at::where(x.abs().gt(column * greatest), beyond, at::zeros_like(beyond));
  }
  if (weights.defined()) {
    error = error * weights;
  }
  return error.to(at::kDouble).sum(1);
}

bool CastError::is_fused(const at::Tensor& x, const at::Tensor& weights) const {
  return x.is_cpu() && x.scalar_type() == at::kFloat && norm_ == 2.0 && clip_weight_ == 1.0 &&
         (!weights.defined() || weights.scalar_type() == at::kFloat);
}

at::Tensor CastError::cheapest(const at::Tensor& x, const at::Tensor& weights, const at::Tensor& ends,
                               at::Tensor& least) const {
  if (is_fused(x, weights)) {
    const auto shape = ops::minifloat_shape("search_scheme", format_.exponent_bits, format_.mantissa_bits, format_.bias,
                                            specials_, format_.saturate);
    return ops::cheapest_casts(x, weights, scale(ends.reshape(-1)).reshape(ends.sizes()), shape, least);
  }
  auto winner = at::full(least.sizes(), -1, least.options().dtype(at::kLong));
  for (int64_t i = 0; i < ends.size(1); ++i) {
    const auto cost = (*this)(x, weights, ends.select(1, i));
    const auto better = cost.lt(least);
    winner = at::where(better, i, winner);
    least = at::where(better, cost, least);
  }
  return winner;
}

at::Tensor best_ends(const at::Tensor& x, const at::Tensor& weights, const CastError& error, int64_t steps) {
  const auto largest = at::maximum(-x.amin(1), x.amax(1)).clamp_min(0.0).to(at::kFloat);
  const auto doubles = largest.options().dtype(at::kDouble);
  auto best = largest, factor_of_best = at::zeros(largest.sizes(), doubles);
  auto least = at::full(largest.sizes(), std::numeric_limits<double>::infinity(), doubles);
  const auto show = [&](const at::Tensor& factors) {  // [k], or [rows, k]
    const auto ends = (largest.to(at::kDouble).unsqueeze(1) * factors).to(at::kFloat);
    const auto winner = error.cheapest(x, weights, ends, least);
    const auto place = winner.clamp_min(0).unsqueeze(1);
    best = at::where(winner.ge(0), ends.gather(1, place).squeeze(1), best);
    factor_of_best = at::where(winner.ge(0), factors.expand_as(ends).gather(1, place).squeeze(1), factor_of_best);
  };
  show(at::ones({1}, doubles));
  factor_of_best.zero_();
  constexpr int kLowestPowers = 16;
  std::vector<double> factors;
  if (error.power_of_two()) {
    for (int i = 1; i <= kLowestPowers; ++i) {
      factors.push_back(std::ldexp(1.0, -i));
    }
    show(at::tensor(factors, doubles));
    return best;
  }
  for (int64_t i = steps - 1; i >= 1; --i) {
    factors.push_back(static_cast<double>(i) / static_cast<double>(steps));
  }
  if (!factors.empty()) {
    show(at::tensor(factors, doubles));
  }
  constexpr int kFiner = 5;
  std::vector<double> finer;
  for (int i = 1 - kFiner; i < kFiner; ++i) {
    if (i != 0) {
      finer.push_back(static_cast<double>(i) / static_cast<double>(kFiner * steps));
    }
  }
  const auto center = factor_of_best.unsqueeze(1);
  const auto around = center + at::tensor(finer, doubles);
  const auto allowed = center.gt(0.0).logical_and(around.gt(0.0)).logical_and(around.lt(1.0));
  show(at::where(allowed, around, at::ones_like(around)));  // once more the whole range, which is no better
  return best;
}

}  // namespace rarefy::quantization
