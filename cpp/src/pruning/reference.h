#pragma once

#include <rarefy/graph/graph.h>
#include <rarefy/pruning/structure.h>
#include <rarefy/pruning/structured_report.h>

#include <functional>
#include <string>
#include <vector>

#include "removed.h"

// What a recorded model computes without some of its units, at its full size: the recording is run again with the
// weights that produce removed channels at zero, consumers that ignore them, and normalizations whose statistics leave
// them out. The physically smaller model must give the same outputs.
namespace rarefy::pruning {

struct Reference {
  std::vector<at::Tensor> outputs;  // of the model, at full size
  std::vector<Fold> folds;
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
