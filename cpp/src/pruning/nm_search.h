#pragma once

#include <ATen/core/Tensor.h>
#include <rarefy/pruning/pattern.h>

#include <cstdint>
#include <vector>

// The search for an order of units, the columns of some weights, in which N:M keeps more.
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

/// Where the units of a group are in a weight: places[unit * each + k] is its k-th place.
struct UnitPlaces {
  NMWeight* weight = nullptr;
  std::vector<int64_t> places;
  int64_t each = 1;
};

struct SearchOptions {
  int64_t escapes = 16;
  double effort = 2e10;  // comparisons of a magnitude with a threshold, about 1e10 a second on one core
  uint64_t seed = 0;
};

/// Exchanges units while N:M keeps more, and leaves the weights in the order that it returns: order[i] is the unit that
/// came to the place of unit i. What is kept never becomes less. Channel swaps, greedily the best of all pairs, as in
/// Pool & Yu, 2021, with random exchanges to leave a local maximum. The result depends on the options alone.
std::vector<int32_t> search_order(const std::vector<UnitPlaces>& where, int64_t units, const SearchOptions& options);

}  // namespace rarefy::pruning
