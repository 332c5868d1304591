#pragma once

#include <rarefy/pruning/structured.h>

#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "removed.h"

// What a cut model did against what the recording and the removal let expect, and which operator is to blame.
namespace rarefy::pruning {

struct Comparison {
  double difference = 0;  // relative, the largest
  std::string failure;    // empty when all outputs are within the tolerance
};

/// Compares outputs. tolerance: largest difference over the largest element; 0: by type (StructuredOptions::tolerance).
Comparison compare(const std::vector<at::Tensor>& expected, const std::vector<at::Tensor>& found, double tolerance);

/// An operator of the first recording, and what is wrong with it.
using Culprit = std::pair<int64_t, std::string>;

/// The first operator that did something else than the recording and the removal let expect: failed, gave other sizes,
/// took a slice elsewhere.
std::optional<Culprit> find_culprit(const graph::Graph& before, const RemovedView& removed, const Recording& after);

/// The operator whose result depends on how many channels there are, though nothing about its sizes says so: a division by
/// x.size(1), a scale read from a value. Where it has no channels of its own any more, those that were summed before it.
std::optional<Culprit> find_difference(const graph::Graph& graph, const Structure& structure,
                                       const RemovedView& removed, bool fold, const graph::Graph& after);

/// Sizes in the arguments of operators that must follow, and those that stay.
std::vector<Resize> find_resizes(const graph::Graph& graph, const RemovedView& removed);

}  // namespace rarefy::pruning
