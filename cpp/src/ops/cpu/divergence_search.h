// The clip range of least Kullback-Leibler divergence (Migacz, "8-bit inference with TensorRT", 2017).
#pragma once

#include <cstdint>
#include <utility>
#include <vector>

namespace rarefy::ops {

/// Divergence of a histogram that is clipped to some of its bins from the same in `levels` levels:
///
///   p   the counts of the bins [first, last), those of the bins outside added to the nearest of them
///   q   the counts of these bins alone, cut into `levels` pieces of equal width (bin j belongs to piece
///       j * levels / (last - first)), each piece's sum spread evenly over its bins that are not empty
///
/// both divided by their sums; sum of p log(p / q). It is infinite where p > 0 = q. Sums over any bins take no time: they
/// are differences of running sums.
class ClipDivergence {
 public:
  explicit ClipDivergence(const std::vector<int64_t>& counts);
  double operator()(int64_t first, int64_t last, int64_t levels) const;

  /// The bins [first, last) of least divergence among those that hold [zero - 1, zero + 1), the place of the value 0; of
  /// equals, the widest. A one-sided search (zero = 0, or zero = the number of bins) moves one end; else the ends are moved
  /// in turn.
  std::pair<int64_t, int64_t> search(int64_t zero, int64_t levels) const;

 private:
  int64_t size() const { return static_cast<int64_t>(counts_.size()); }

  const std::vector<int64_t>& counts_;
  std::vector<int64_t> before_, filled_;  // running sums of counts, and of bins that are not empty
  std::vector<double> entropy_;           // running sums of c log c
};

}  // namespace rarefy::ops
