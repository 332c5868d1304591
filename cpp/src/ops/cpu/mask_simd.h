// The inner loops of magnitude_mask, score_mask, nm_mask and apply_mask_ on one range of a contiguous tensor. No ATen here.
//
// The key of an element is its magnitude's float32 bits, as int32: keys sort as magnitudes do, 0 is the smallest and
// NaN lies above kInfinityKey. A signed key is the same with the sign of the number, so that keys sort as numbers do and
// -0 equals 0. Comparing bits keeps denormals apart whatever the floating-point mode of the thread is.
#pragma once

#include <stdint.h>

#include "ops/cpu/float_type.h"
#include "ops/cpu/isa.h"

namespace rarefy::cpu {

constexpr int64_t kScanSlack = 16;  // elements that scan_keys may write beyond the keys it returns

constexpr int32_t kInfinityKey = 0x7f800000;

struct KeyScan {
  int64_t below;    // alive elements with key < low
  int64_t inside;   // alive elements with low <= key <= high, whose keys were written out
  int32_t largest;  // largest magnitude's key, alive or not
};

RAREFY_DECLARE_ISA(
    /// Counts the keys of elements [begin, end) against [low, high] and writes those inside it to `inside`, which has
    /// room for end - begin + kScanSlack. `alive` is a packed mask, or null for all. begin is a multiple of 64.
    KeyScan scan_keys(const void* x, const uint8_t* alive, FloatType type, bool is_signed, int32_t low, int32_t high,
                      int64_t begin, int64_t end, int32_t* inside);

    /// mask = alive and key > threshold for elements [begin, end), in whole 64-bit words with zero padding. Returns how
    /// many alive elements have key == threshold. begin is a multiple of 64.
    int64_t write_mask(const void* x, const uint8_t* alive, FloatType type, bool is_signed, int32_t threshold,
                       int64_t begin, int64_t end, uint8_t* mask);

    /// The mask that keeps the n largest keys of every 4 consecutive elements of [begin, end), n in [1, 3]; of equal keys
    /// the later one. Whole 64-bit words with zero padding. Returns the largest magnitude's key. begin is a multiple of
    /// 64, end of 4.
    int32_t write_n_of_4(const void* x, FloatType type, bool is_signed, int n, int64_t begin, int64_t end,
                         uint8_t* mask);

    /// x = +0 where the bit of mask is 0 for elements [begin, end) of element_bytes (2, 4 or 8) each. begin is a
    /// multiple of 64.
    void apply_mask(void* x, const uint8_t* mask, int element_bytes, int64_t begin, int64_t end);)

}  // namespace rarefy::cpu
