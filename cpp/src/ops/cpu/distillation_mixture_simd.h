// The divergences that compare p or q with a mixture of both, and total variation: a pass over the exponentials of a row.
// Only for files that cmake/RarefyIsa.cmake compiles.
#pragma once

#include "ops/cpu/lane_sum.h"
#include "ops/cpu/simd_math.h"
#include "ops/divergence.h"

namespace rarefy::cpu::RAREFY_ISA {

struct Mixture {
  double divergence;
  double mean_slope;  // sum of q * slope
};

// Probabilities below this count as 0: they are beyond what the row's sum resolves by 20 orders of magnitude.
constexpr float kNegligible = 1e-30f;

struct MixtureTerm {
  Vec value;  // what a class adds to the divergence
  Vec slope;  // the divergence's derivative in q, up to a constant that is the same for all classes
};

/// p == q gives exactly 0 for both members: the mixture m is then q, bit by bit.
template <Divergence divergence>
inline MixtureTerm mixture_term(Vec p, Vec q, Vec skew, Vec rest) {
  const Vec smallest(1.17549435e-38f);  // in place of m = 0, where p = q = 0
  if constexpr (divergence == Divergence::total_variation) {
    const Vec half(0.5f);
    return {half * max(p - q, q - p), zero_below(q, p, half) - zero_below(p, q, half)};
  } else if constexpr (divergence == Divergence::skewed_kl) {
    const Vec d = p - q, m = max(smallest, q + skew * d);
    return {p * log_positive(p / m), Vec(0.0f) - rest * (rest * d / m)};
  } else if constexpr (divergence == Divergence::skewed_reverse_kl) {
    const Vec d = q - p, m = max(smallest, p + skew * d), log_ratio = log_positive(q / m);
    return {q * log_ratio, log_ratio - skew * (rest * d / m)};
  } else {
    const Vec m = max(smallest, q + skew * (p - q)), log_q = log_positive(q / m);
    return {skew * (p * log_positive(p / m)) + rest * (q * log_q), rest * log_q};
  }
}

template <Divergence divergence>
inline Mixture mix_with(float skew, const float* e_s, float* e_t, int64_t n, double sum_s, double sum_t) {
  const Vec inverse_s(static_cast<float>(1.0 / sum_s)), inverse_t(static_cast<float>(1.0 / sum_t));
  const Vec first(skew), rest(1.0f - skew), negligible(kNegligible);
  Mixture result{0.0, 0.0};
  LaneSum value, slope;
  for (int64_t chunk = 0; chunk < n; chunk += kChunk) {
    for (int64_t step = chunk; step < n && step < chunk + kChunk; step += kStep) {
      for (int part = 0; part < kParts; ++part) {
        const int64_t i = step + part * Vec::size;
        Vec q = Vec::load(e_s + i) * inverse_s, p = Vec::load(e_t + i) * inverse_t;
        q = zero_below(q, negligible, q);
        p = zero_below(p, negligible, p);
        MixtureTerm term = mixture_term<divergence>(p, q, first, rest);
        term.slope = zero_below(q, negligible, term.slope);
        value.add(part, term.value);
        slope.add(part, q * term.slope);
        term.slope.store(e_t + i);
      }
    }
    value.flush(&result.divergence);
    slope.flush(&result.mean_slope);
  }
  result.mean_slope += 0.0 * result.divergence;  // NaN in a logit shows in the gradient too
  return result;
}

/// The divergence of p = e_t / sum_t and q = e_s / sum_s, in rows that are filled up with 0 to a multiple of kStep. Puts the
/// slopes in the place of e_t.
inline Mixture mix(Divergence divergence, float skew, const float* e_s, float* e_t, int64_t n, double sum_s,
                   double sum_t) {
  switch (divergence) {
    case Divergence::total_variation:
      return mix_with<Divergence::total_variation>(skew, e_s, e_t, n, sum_s, sum_t);
    case Divergence::skewed_kl:
      return mix_with<Divergence::skewed_kl>(skew, e_s, e_t, n, sum_s, sum_t);
    case Divergence::skewed_reverse_kl:
      return mix_with<Divergence::skewed_reverse_kl>(skew, e_s, e_t, n, sum_s, sum_t);
    default:
      return mix_with<Divergence::jensen_shannon>(skew, e_s, e_t, n, sum_s, sum_t);
  }
}

}  // namespace rarefy::cpu::RAREFY_ISA
