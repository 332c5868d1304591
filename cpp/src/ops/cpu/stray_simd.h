// The inner loop of stray_values on one range of a contiguous tensor. No ATen here.
#pragma once

#include <stdint.h>

#include "ops/cpu/isa.h"

namespace rarefy::cpu {

struct Stray {
  int64_t count;
  int64_t first;  // -1 when count is 0
};

RAREFY_DECLARE_ISA(
    /// Elements of [begin, end) that are not zero (whatever their sign) where the bit of mask is 0. element_bytes is 2, 4
    /// or 8, begin a multiple of 64.
    Stray count_stray(const void* x, const uint8_t* mask, int element_bytes, int64_t begin, int64_t end);)

}  // namespace rarefy::cpu
