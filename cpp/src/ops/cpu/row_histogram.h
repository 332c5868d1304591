// One histogram while it grows, and rows of a tensor to fill histograms from.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <functional>
#include <limits>
#include <optional>
#include <vector>

#include "ops/cpu/float_type.h"
#include "ops/histogram_layout.h"

namespace rarefy::ops {

/// Counts of float values; bins as in rarefy/ops/histogram.h.
class RowHistogram {
 public:
  explicit RowHistogram(int64_t bins) : counts_(static_cast<size_t>(bins)) {}

  /// Counts `runs` runs of n values in memory, each `stride` values after the one before. Returns false, with the state
  /// unspecified, when one is not finite.
  bool add(const void* x, cpu::FloatType type, int64_t n, int64_t runs = 1, int64_t stride = 0);
  /// Adds the counts of another one of as many bins. Nothing, where it has a range of (+inf, -inf).
  void add(const int64_t* counts, float low, float high);
  void add(RowHistogram& other);

  /// Gives the memory back that counting needs. It is taken again when more is counted.
  void release();

  bool empty() const { return low_ > high_; }
  float low() const { return low_; }
  float high() const { return high_; }
  const HistogramLayout& layout() const { return layout_; }
  int64_t bins() const { return static_cast<int64_t>(counts_.size()); }
  const std::vector<int64_t>& counts() {
    flush();
    return counts_;
  }

 private:
  bool add_part(const char* x, cpu::FloatType type, int64_t n, int64_t runs, int64_t stride);
  void widen(float low, float high);
  void flush();

  std::vector<int64_t> counts_;
  std::vector<uint32_t> recent_;  // kCounters a bin, not yet in counts_
  int64_t recent_count_ = 0;
  HistogramLayout layout_;
  float low_ = std::numeric_limits<float>::infinity();
  float high_ = -std::numeric_limits<float>::infinity();
};

/// x as rows of values in one block of memory: one for the tensor (axis -1; in any order), or one per index of the axis.
/// float64 becomes float32.
at::Tensor value_rows(const at::Tensor& x, int64_t axis);

/// Calls use(row, histogram) with the histogram of x per tensor (axis -1) or of each index of the axis, on all threads: while
/// it is in the cache. Use may move it. Returns false when a value is not finite, with some rows left out.
bool for_each_row_histogram(const at::Tensor& x, int64_t axis, int64_t bins,
                            const std::function<void(int64_t, RowHistogram&)>& use);

/// The histograms of x per tensor (axis -1) or per index of the axis, on all threads; unset when a value is not finite.
std::optional<std::vector<RowHistogram>> row_histograms(const at::Tensor& x, int64_t axis, int64_t bins);

}  // namespace rarefy::ops
