// The inner loop of fake_quantize_range_backward on one range of a dense tensor. No ATen here.
#pragma once

#include <stdint.h>

#include "ops/cpu/fake_quantize_simd.h"

namespace rarefy::cpu {

/// One value for each channel.
struct Ends {
  const float* scale;  // finite and positive
  const float* low;
  const float* high;
  const float* before_low;  // the float below low
  const float* after_high;  // the float above high
};

RAREFY_DECLARE_ISA(
    /// out = grad where low <= x <= high, 0 elsewhere, for elements [begin, end), bit by bit; and to sums[3 * channel] is added
    /// the sum of grad * (round(x / scale) - x / scale) there, to the next two those of grad where x < low and where x > high.
    /// The additions come in an order that layout, begin and end decide. grad may equal out.
    void range_gradient(const void* grad, const void* x, void* out, Layout layout, Ends ends, double* sums,
                        int64_t begin, int64_t end);)

}  // namespace rarefy::cpu
