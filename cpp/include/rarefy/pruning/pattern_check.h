#pragma once

#include <ATen/core/Tensor.h>
#include <rarefy/export.h>
#include <rarefy/pruning/pattern.h>

namespace rarefy::pruning {

/// True when a boolean mask (true = kept) has the pattern: at most n of m kept in each group, units kept or pruned as a
/// whole. On any device. Throws c10::ValueError for sizes that cannot have it.
RAREFY_API bool holds_pattern(const Pattern& pattern, const at::Tensor& kept);

}  // namespace rarefy::pruning
