#pragma once

#include <rarefy/pruning/choice.h>

#include <cstdint>
#include <string>
#include <vector>

namespace rarefy::pruning {

/// A group with the order in which its units leave and the numbers of units that may leave.
struct RankedGroup {
  std::vector<int32_t> order;  // lowest score first; empty for a group that is left alone
  std::vector<double> scores;  // in this order
  int64_t units = 0;
  int64_t original = 0;  // units of the baseline
  int64_t most = 0;      // how many may leave now
  int64_t step = 1;      // units left are a multiple of it, or all
  std::string bound;     // why not more than `most`

  /// The number of units nearest to `count` that may leave; of two equally near the smaller.
  int64_t rounded(int64_t count) const;
};

std::vector<RankedGroup> rank(const Structure& structure, const std::vector<GroupScore>& scores,
                              const ChoiceOptions& options, const std::vector<int64_t>& original);

/// Groups that compete, as indices.
std::vector<std::vector<size_t>> competitors(const Structure& structure, const Shapes& shapes, UnitScope scope);

/// The groups' units in the order in which they leave: of each the group, whose units leave in its own order.
std::vector<size_t> sequence(const std::vector<RankedGroup>& groups, const std::vector<size_t>& chosen);

/// The sequences of all pools, merged so that all have lost the same fraction of their original units at each point.
std::vector<size_t> merged(const std::vector<RankedGroup>& groups, const std::vector<std::vector<size_t>>& pools);

}  // namespace rarefy::pruning
