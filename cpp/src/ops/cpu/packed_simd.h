// The inner loops that turn stored codes into numbers. No ATen here.
#pragma once

#include <stdint.h>

#include "ops/cpu/isa.h"

namespace rarefy::cpu {

RAREFY_DECLARE_ISA(
    /// Two codes of 4 bits in each byte, the first in the low half: n codes of (n + 1) / 2 bytes.
    void split_nibbles(const uint8_t* bytes, int64_t n, uint8_t* codes);
    /// out[i] = table[codes[i]] * scale; codes below 16 and a table of 16 entries where `is_small`, below 256 otherwise.
    void scaled_table(const uint8_t* codes, int64_t n, const float* table, bool is_small, float scale, float* out);
    /// out[i] = (codes[i] - zero) * scale, for whole numbers `zero`.
    void scaled_integers(const uint8_t* codes, int64_t n, float zero, float scale, float* out);)

}  // namespace rarefy::cpu
