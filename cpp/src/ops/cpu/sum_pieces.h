// Sums per channel whose result does not depend on the number of threads.
#pragma once

#include <ATen/Parallel.h>

#include <algorithm>
#include <cstdint>
#include <vector>

#include "ops/cpu/dense.h"

namespace rarefy::ops {

/// Elements that are summed together. The shape alone decides, so the sums do not know how many threads there are; each
/// piece has a sum per channel, and `channels` of them are at most a 16th of its elements.
inline int64_t piece_of(int64_t elements, int64_t channels) {
  constexpr int64_t kMostPieces = 256, kMultiple = 1024;
  const int64_t piece = std::max({kGrain, (elements + kMostPieces - 1) / kMostPieces, 16 * channels});
  return (piece + kMultiple - 1) / kMultiple * kMultiple;
}

/// sums(first element, last element, double* of `channels` sums) over all pieces in parallel, added up in order.
template <typename Sums>
std::vector<double> sum_pieces(int64_t elements, int64_t channels, const Sums& sums) {
  const int64_t piece = piece_of(elements, channels), pieces = (elements + piece - 1) / piece;
  std::vector<double> partial(static_cast<size_t>(pieces * channels));
  at::parallel_for(0, pieces, 1, [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) {
      sums(i * piece, std::min((i + 1) * piece, elements), partial.data() + i * channels);
    }
  });
  std::vector<double> total(static_cast<size_t>(channels));
  for (int64_t i = 0; i < pieces; ++i) {
    for (int64_t c = 0; c < channels; ++c) {
      total[static_cast<size_t>(c)] += partial[static_cast<size_t>(i * channels + c)];
    }
  }
  return total;
}

}  // namespace rarefy::ops
