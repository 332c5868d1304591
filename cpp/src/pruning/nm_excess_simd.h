// The inner loop of the search for N:M channel orders. No ATen here.
#pragma once

#include <stdint.h>

#include "ops/cpu/isa.h"

namespace rarefy::cpu {

RAREFY_DECLARE_ISA(
    /// sums[i] += max(0, values[i] - threshold) for i in [0, n).
    void add_excess(const float* values, float threshold, float* sums, int64_t n);)

}  // namespace rarefy::cpu
