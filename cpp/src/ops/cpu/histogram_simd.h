// The inner loops of histograms and of the searches on them. No ATen here.
#pragma once

#include <stdint.h>

#include "ops/cpu/float_type.h"
#include "ops/cpu/isa.h"

namespace rarefy::cpu {

/// Counters of one bin, side by side: neighbouring elements count in different ones, so that equal values do not wait for
/// each other's stores.
constexpr int kCounters = 4;
/// squared_error_integral adds the terms of edge i to sum i % 8. Leaving out 8 edges of weight 0 that begin at a multiple of 8
/// does not change its result.
constexpr int kSumsOfIntegral = 8;

RAREFY_DECLARE_ISA(
    /// Adds one to a counter of the bin of each of n elements: counters[(place - base) * kCounters + any]. Every element has
    /// such a bin. inverse_width is a power of two.
    void count(const void* x, FloatType type, float inverse_width, int32_t base, uint32_t* counters, int64_t n);

    /// The sum over n edges of weight[i] * E(edge[i]), where E(x) is the integral from 0 to x of the squared error of a grid
    /// of step `scale` from first to last steps, and of clip_weight times it beyond half a step outside. Divided by scale^3.
    double squared_error_integral(const double* edge, const double* weight, int64_t n, double scale, double first,
                                  double last, double clip_weight);)

}  // namespace rarefy::cpu
