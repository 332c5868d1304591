// k-means of numbers on a line, exactly or by Lloyd's algorithm.
#pragma once

#include <cstdint>
#include <vector>

namespace rarefy::ops {

struct WeightedValue {
  double value, weight;  // weight > 0
};

/// `entries` centers in ascending order; the last one repeats where there are fewer different values. `points` are not empty.
std::vector<double> kmeans(std::vector<WeightedValue> points, int64_t entries, int64_t iterations);

}  // namespace rarefy::ops
