// The tensors of a pruner: what they must be before anything is computed or changed.
#pragma once

#include <rarefy/pruning/state.h>

namespace rarefy::pruning {

/// Throws c10::ValueError for masks and a counter that do not fit (a checkpoint of another model).
void check_state(const PruningState& state);

/// The same for what the options keep beside them.
void check_kept(const PruningState& state, const PrunerOptions& options);

}  // namespace rarefy::pruning
