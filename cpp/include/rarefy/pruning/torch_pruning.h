#pragma once

#include <rarefy/checkpoint.h>
#include <rarefy/export.h>

// State of models that torch.nn.utils.prune has pruned: it renames a parameter `weight` to `weight_orig`, keeps a float mask
// `weight_mask` beside it, and multiplies both before every forward pass.
namespace rarefy::pruning {

/// Turns each pair `x_orig` and `x_mask` into `x`, with +0 where the mask is 0 and the same bits elsewhere, and `x_mask_bits`, the
/// packed mask of a pruner; a step counter of 0 is added where there is none. Everything else stays, in its order.
/// Throws c10::ValueError for a state without such a pair, an `x_orig` without a mask (that of torch's spectral norm, which has
/// `x_u` too, is left alone), an `x` that is there already, a mask of another shape, and one with values other than 0 and 1.
RAREFY_API NamedTensors import_torch_pruning(const NamedTensors& state);

/// The way back: each `x` with an `x_mask_bits` becomes `x_orig` and `x_mask`, of the type of x; other state of a pruner is left
/// out. Throws c10::ValueError for a state without masks, a mask without its tensor or of another size.
RAREFY_API NamedTensors export_torch_pruning(const NamedTensors& state);

}  // namespace rarefy::pruning
