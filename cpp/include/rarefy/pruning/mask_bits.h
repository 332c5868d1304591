#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/ArrayRef.h>
#include <rarefy/export.h>
#include <rarefy/pruning/pattern.h>

// Packed masks (rarefy/ops/mask.h) and boolean ones of a weight's sizes, true = kept. On any device.
namespace rarefy::pruning {

/// The packed mask of a boolean one. Throws c10::TypeError for another type.
RAREFY_API at::Tensor pack_mask(const at::Tensor& kept);

/// The boolean mask of these sizes. Throws c10::ValueError for another number of bytes.
RAREFY_API at::Tensor unpack_mask(const at::Tensor& mask, c10::IntArrayRef sizes);

/// True when a boolean mask has the pattern: at most n of m kept in each group, units kept or pruned as a whole. Throws
/// c10::ValueError for sizes that cannot have it.
RAREFY_API bool holds_pattern(const Pattern& pattern, const at::Tensor& kept);

}  // namespace rarefy::pruning
