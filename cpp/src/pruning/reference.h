#pragma once

#include <rarefy/graph/graph.h>
#include <rarefy/pruning/structure.h>
#include <rarefy/pruning/structured_report.h>

#include <functional>
#include <string>
#include <vector>

// What a recorded model computes without some of its units, at its full size: the recording is run again with the
// weights that produce removed channels at zero, consumers that ignore them, and normalizations whose statistics leave
// them out. The physically smaller model must give the same outputs.
namespace rarefy::pruning {

struct Reference {
  std::vector<at::Tensor> outputs;  // of the model, at full size
  std::vector<Fold> folds;
};

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

/// Runs the reference. With `fold`, channels that are constant once their weights are zero keep their constants where the
/// consumer can take them exactly; elsewhere, and without it, consumers ignore removed channels altogether.
Reference run_reference(const graph::Graph& graph, const RemovedView& removed, bool fold);

/// The first operator of a recording that gives something else in the pruned model than in the reference, by more than
/// `tolerance` of its largest element; -1 when there is none, or when the two do not run the same operators.
///   after  a recording of the pruned model on the same inputs, its tensors as they are now
int64_t first_difference(const graph::Graph& graph, const RemovedView& removed, bool fold, const graph::Graph& after,
                         double tolerance);

}  // namespace rarefy::pruning
