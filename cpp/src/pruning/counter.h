#pragma once

#include <rarefy/pruning/counts.h>

#include <cstdint>
#include <string>
#include <vector>

namespace rarefy::pruning {

/// Counts for many removals along one order: the units of each group leave in the order given, and `removed` says how
/// many of them have left. One count costs a few operations per tensor, however many channels there are.
class Counter {
 public:
  /// order[g] lists units of group g, each once; those that are not in it stay.
  Counter(const Structure& structure, const Shapes& shapes, const std::vector<std::vector<int32_t>>& order);

  int64_t parameters(const std::vector<int64_t>& removed) const;
  double macs(const std::vector<int64_t>& removed) const;
  int64_t channels(const std::vector<int64_t>& removed) const;
  Counts all(const std::vector<int64_t>& removed) const;

 private:
  /// What one group takes from an axis: `each` per unit when all units lie in it equally often, else the running sum.
  struct Part {
    size_t group = 0;
    int64_t each = -1;
    std::vector<int64_t> lost;  // after 0, 1, ... units
  };
  struct Axis {
    int64_t size = 0;
    std::vector<Part> parts;

    int64_t left(const std::vector<int64_t>& removed) const;
  };
  struct Product {
    double factor = 1;
    std::vector<Axis> axes;
  };

  Axis make_axis(const Structure& structure, const std::vector<std::pair<int32_t, int32_t>>& of_index,
                 const std::vector<std::vector<int32_t>>& order, const std::string& what) const;

  int64_t units_ = 0;
  int64_t fixed_parameters_ = 0;  // of tensors that no group touches
  std::vector<Product> tensors_;
  std::vector<Product> costs_;
};

/// removal as an order and how many leave. Throws c10::ValueError when its size is not the number of groups and for
/// units that are not ascending, c10::IndexError for one that a group does not have.
std::vector<int64_t> check_removal(const Structure& structure, const Removal& removal);

}  // namespace rarefy::pruning
