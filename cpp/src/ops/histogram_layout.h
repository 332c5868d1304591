// Where the bins of a histogram lie (rarefy/ops/histogram.h): one formula for every backend.
#pragma once

#include <math.h>
#include <stdint.h>

namespace rarefy {

constexpr int kLowestExponent = -100;  // of a bin's width: far below the smallest scale's half step

/// Bin i holds the place base + i of width 2^exponent.
struct HistogramLayout {
  int exponent = kLowestExponent;
  int64_t base = 0;
  bool operator==(const HistogramLayout&) const = default;
};

/// Truncating towards 0 on both sides makes x and -x mirrors of each other; halving a place is then a shift.
inline int64_t place_of(float x, int exponent) {
  const auto steps = static_cast<int64_t>(ldexp(fabs(static_cast<double>(x)), -exponent));
  return x < 0.0f ? ~steps : steps;
}

/// That of the range [low, high], finite with low <= high.
inline HistogramLayout layout_of_range(float low, float high, int64_t bins) {
  low = low < 0.0f ? low : 0.0f;
  high = high > 0.0f ? high : 0.0f;
  const double width = static_cast<double>(high) - static_cast<double>(low);
  HistogramLayout layout;
  if (width > 0.0) {
    // Surely too fine: the width is 2 * bins places there.
    const int start = ilogb(width / static_cast<double>(bins)) - 1;
    layout.exponent = start > kLowestExponent ? start : kLowestExponent;
    while (place_of(high, layout.exponent) - place_of(low, layout.exponent) + 1 > bins) {
      ++layout.exponent;
    }
  }
  layout.base = place_of(low, layout.exponent);
  return layout;
}

/// Adds counts to those of a layout that is as wide or wider.
inline void add_rebinned(const int64_t* from, HistogramLayout layout, int64_t* to, HistogramLayout wider,
                         int64_t bins) {
  const int shift = wider.exponent - layout.exponent;
  for (int64_t i = 0; i < bins; ++i) {
    if (from[i] != 0) {
      to[((layout.base + i) >> (shift < 62 ? shift : 62)) - wider.base] += from[i];
    }
  }
}

}  // namespace rarefy
