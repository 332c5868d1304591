#pragma once

#include <ATen/core/Tensor.h>
#include <rarefy/pruning/mask_choice.h>

#include <vector>

// Masks that prune whole units: blocks, rows, columns, filters and heads.
namespace rarefy::pruning {

/// Masks of candidates that compete with each other; see choose_masks(). The pattern is one of units, which fits every
/// candidate.
std::vector<at::Tensor> unit_masks(const std::vector<const Candidate*>& candidates, const Pattern& pattern,
                                   double sparsity, bool regrow);

}  // namespace rarefy::pruning
