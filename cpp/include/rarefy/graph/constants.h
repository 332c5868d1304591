#pragma once

#include <rarefy/export.h>
#include <rarefy/graph/graph.h>

#include <cstdint>
#include <vector>

namespace rarefy::graph {

/// The scheduled operators whose results are the same in every run: they depend on no input, no parameter and no random
/// number, only on buffers, other constants and sizes (positions, masks). An operator that changes a buffer, or memory
/// that others read before, is not among them.
RAREFY_API std::vector<int64_t> constant_nodes(const Graph& graph);

/// The recording without its constant operators: they are run once more, and the results that the others read become
/// constants (Origin::constant) with their tensors. Numbers of nodes and values stay. Operators that make no tensor and
/// read only constants (sizes, assertions) go too.
RAREFY_API Graph fold_constants(const Graph& graph);

}  // namespace rarefy::graph
