// The cheapest of many candidates whose cost need not be known where it is too high.
#pragma once

#include <cstddef>

namespace rarefy {

/// The candidate in [0, count) of least cost, the first of equals, where that is below *least, which becomes it; `count` where
/// there is none. cost(i, limit) gives the cost of candidate i, or where that is more than the limit perhaps another number
/// above the limit, which may be found sooner. Every eighth goes first: the others then meet a low limit.
template <typename Cost>
size_t first_cheapest(size_t count, double* least, const Cost& cost) {
  constexpr size_t kEvery = 8;
  size_t winner = count;
  const auto show = [&](size_t i) {
    const double of_this = cost(i, *least);
    if (of_this < *least || (of_this == *least && winner < count && i < winner)) {
      *least = of_this;
      winner = i;
    }
  };
  for (size_t i = 0; i < count; i += kEvery) {
    show(i);
  }
  for (size_t i = 0; i < count; ++i) {
    if (i % kEvery != 0) {
      show(i);
    }
  }
  return winner;
}

}  // namespace rarefy
