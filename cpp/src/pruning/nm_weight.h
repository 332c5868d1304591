#pragma once

#include <ATen/core/Tensor.h>
#include <rarefy/pruning/pattern.h>

#include <cstdint>
#include <utility>
#include <vector>

namespace rarefy::pruning {

/// Magnitudes of a weight, column by column of its dimension 1, and which column is at each place now.
class NMWeight {
 public:
  NMWeight(const at::Tensor& weight, const NM& pattern);

  int64_t places() const { return places_; }
  int64_t lines() const { return lines_; }
  int64_t stripe_of(int64_t place) const { return place / pattern_.m; }
  /// `lines` magnitudes of the column at a place.
  const float* column(int64_t place) const { return magnitudes_.data() + at_[static_cast<size_t>(place)] * lines_; }
  const NM& pattern() const { return pattern_; }
  void exchange(int64_t a, int64_t b) { std::swap(at_[static_cast<size_t>(a)], at_[static_cast<size_t>(b)]); }
  /// The magnitude that N:M keeps of the m (or fewer) columns of a stripe.
  double kept(int64_t stripe) const;
  double kept() const;
  double total() const;

 private:
  NM pattern_;
  int64_t places_, lines_;
  std::vector<float> magnitudes_;
  std::vector<int64_t> at_;
};

}  // namespace rarefy::pruning
