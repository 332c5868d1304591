#pragma once

#include <cstdint>
#include <vector>

#include "pruning/nm_weight.h"

// The search for an order of units, the columns of some weights, in which N:M keeps more.
namespace rarefy::pruning {

/// Where the units of a group are in a weight: places[unit * each + k] is its k-th place.
struct UnitPlaces {
  NMWeight* weight = nullptr;
  std::vector<int64_t> places;
  int64_t each = 1;
};

struct SearchOptions {
  int64_t escapes = 16;
  double effort = 2e10;  // comparisons of a magnitude with a threshold, about 7e9 a second on one core
  uint64_t seed = 0;
};

/// Exchanges units while N:M keeps more, and leaves the weights in the order that it returns: order[i] is the unit that
/// came to the place of unit i. What is kept never becomes less. Channel swaps, greedily the best of all pairs, as in
/// Pool & Yu, 2021, with random exchanges to leave a local maximum. The result depends on the options alone.
std::vector<int32_t> search_order(const std::vector<UnitPlaces>& where, int64_t units, const SearchOptions& options);

}  // namespace rarefy::pruning
