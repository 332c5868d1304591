// Ranges chosen from one histogram.
#pragma once

#include <cstdint>
#include <vector>

#include "ops/histogram_checks.h"
#include "ops/histogram_layout.h"
#include "ops/narrowing.h"

namespace rarefy::ops {

/// The methods of choose_range_from_histogram (rarefy/ops/histogram.h) on one row.
class HistogramSearch {
 public:
  /// `counts` holds `bins` counts, one of them positive, of values in [low, high]; it is read, and kept by pointer.
  HistogramSearch(const int64_t* counts, int64_t bins, float low, float high, const TargetGrid& grid);

  ValueRange choose(RangeMethod method, double parameter) const;
  /// The search for the least error that mse_range makes on a histogram.
  ValueRange least_error(double norm, int64_t steps) const;

 private:
  /// Counts over bins with edges, clipped to the values seen.
  struct Bins {
    std::vector<int64_t> counts;
    std::vector<double> edges;  // one more than counts
  };
  Bins whole() const;
  /// Of the first `bins` bins.
  std::vector<double> edges(int64_t bins) const;
  /// Magnitudes: the mirrored bins of both signs are one.
  Bins folded() const;

  ValueRange percentile(double percent) const;
  ValueRange least_noise(double clip_weight) const;
  /// With the error of values spread evenly in their bins.
  ValueRange least_of(double norm, double clip_weight, int64_t steps) const;
  ValueRange least_divergence() const;

  const int64_t* counts_;
  int64_t bins_;
  ValueRange range_;
  TargetGrid grid_;
  HistogramLayout layout_;
};

}  // namespace rarefy::ops
