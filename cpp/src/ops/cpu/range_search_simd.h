// The inner loops of the searches for a range on the values themselves. No ATen here.
#pragma once

#include <stdint.h>

#include "ops/cpu/formats_simd.h"
#include "ops/cpu/isa.h"

namespace rarefy::cpu {

/// The grid of integers first..last, 0 at the value 0, in units of its step.
struct StepGrid {
  float scale;
  float first;
  float last;
};

/// What half-quadratic splitting sums over the values, with q the integer of a value, z the zero point and t = x / scale - e.
struct SplittingSums {
  double q, t, qq, tq;
};

RAREFY_DECLARE_ISA(
    /// factor times the sum of importance * |x / scale - nearest grid point|^norm; where that is more than the limit, perhaps
    /// of the first elements only, which are then enough to be above it. importance may be null (1). bound is at least the
    /// greatest distance, and positive. Results do not depend on the instruction set.
    double grid_error(const float* x, const float* importance, int64_t n, StepGrid grid, double norm, float bound,
                      double factor, double limit);

    /// The sum of weight * (x - minifloat(x / scale) * scale)^2, the terms in float, added in double; where that is more than
    /// the limit, perhaps of the first elements only, which are then enough to be above it. weight may be null (1).
    double cast_error(const float* x, const float* weight, int64_t n, float scale, Element element, double limit);

    /// One round of splitting: q = clamp(round(x / scale + z), qmin, qmax), r = x / scale - (q - z) and
    /// e = sign(r) * max(|r| - |r|^(norm - 1) / beta, 0). bound is at least |r|, and positive.
    void splitting_sums(const float* x, int64_t n, float scale, float z, float qmin, float qmax, float norm, float beta,
                        float bound, SplittingSums* sums);)

}  // namespace rarefy::cpu
