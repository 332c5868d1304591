// The inner loop of relu_mask on one range of a dense tensor. No ATen here.
#pragma once

#include <stdint.h>

#include "ops/cpu/float_type.h"
#include "ops/cpu/isa.h"

namespace rarefy::cpu {

RAREFY_DECLARE_ISA(
    /// y = max(x, 0), NaN staying NaN, for elements [begin, end); bit i of mask is 1 where not x <= 0. The last word is
    /// filled up with 0. begin is a multiple of 64, so is end unless it is the tensor's. x may equal y.
    void relu_mask(FloatType type, const void* x, void* y, uint8_t* mask, int64_t begin, int64_t end);)

}  // namespace rarefy::cpu
