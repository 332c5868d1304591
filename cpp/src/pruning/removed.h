#pragma once

#include <rarefy/graph/graph.h>
#include <rarefy/pruning/structure.h>

#include <cstdint>
#include <vector>

// What a removal takes from every tensor of a recording.
namespace rarefy::pruning {

/// Places of a value that a removal takes away: per dimension, ascending.
struct RemovedPlaces {
  int64_t dim = 0;
  std::vector<int64_t> removed;
  std::vector<int64_t> kept;
};

/// Answers what a removal takes from each value of a recording.
class RemovedView {
 public:
  RemovedView(const graph::Graph& graph, const Structure& structure, const Removal& removal);
  /// Of a recording of which nothing is removed.
  explicit RemovedView(const graph::Graph& graph);
  ~RemovedView();
  RemovedView(const RemovedView&) = delete;
  RemovedView& operator=(const RemovedView&) = delete;

  const std::vector<RemovedPlaces>& of(int64_t value) const;
  /// The removed places along one dimension; null when there are none.
  const RemovedPlaces* along(int64_t value, int64_t dim) const;
  /// The value's sizes afterwards.
  std::vector<int64_t> sizes(int64_t value) const;
  /// False for parameters and what is computed from them alone.
  bool depends_on_input(int64_t value) const;
  bool any(int64_t value) const { return !of(value).empty(); }

 private:
  const graph::Graph& graph_;
  const Provenance* provenance_ = nullptr;
  std::vector<char> gone_;  // by label
  mutable std::vector<std::vector<RemovedPlaces>> places_;
  mutable std::vector<char> known_;
};

}  // namespace rarefy::pruning
