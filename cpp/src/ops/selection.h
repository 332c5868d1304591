// Selection by rank: which of many integer keys is the one with `rank` smaller ones, by narrowing a range of keys with
// histograms. The caller fills the histogram, so the keys may lie anywhere, on any device.
#pragma once

#include <c10/util/Exception.h>

#include <algorithm>
#include <array>
#include <cstdint>

namespace rarefy::ops {

constexpr int kBins = 2048;
using Histogram = std::array<int64_t, kBins>;

/// The keys in [low, high]; `below` keys are smaller than low.
struct KeyRange {
  int64_t low;
  int64_t high;
  int64_t below;
};

/// The smallest shift with which bin (key - low) >> shift is below kBins for every key of the range.
inline int bin_shift(const KeyRange& range) {
  int shift = 0;
  while ((range.high - range.low) >> shift >= kBins) {
    ++shift;
  }
  return shift;
}

/// The keys of the bin that holds the rank.
inline KeyRange narrow(const KeyRange& range, int shift, const Histogram& histogram, int64_t rank) {
  int64_t below = range.below;
  for (int64_t bin = 0; bin < kBins; ++bin) {
    const int64_t count = histogram[static_cast<size_t>(bin)];
    if (rank < below + count) {
      const int64_t low = range.low + (bin << shift);
      return {low, std::min(range.high, low + ((int64_t{1} << shift) - 1)), below};
    }
    below += count;
  }
  TORCH_INTERNAL_ASSERT(false, "rank ", rank, " lies above the range, which ends at rank ", below);
}

/// A range of at most `width` keys that holds the key of the given rank, in at most ceil(bits of the range / 11)
/// passes. fill(range, shift, histogram) counts the keys of the range into a zeroed histogram.
template <typename Fill>
KeyRange select_rank(KeyRange range, int64_t rank, int64_t width, const Fill& fill) {
  while (range.high - range.low >= width) {
    const int shift = bin_shift(range);
    Histogram histogram{};
    fill(range, shift, histogram);
    range = narrow(range, shift, histogram, rank);
  }
  return range;
}

}  // namespace rarefy::ops
