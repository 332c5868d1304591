#pragma once

#include <ATen/core/Tensor.h>
#include <rarefy/pruning/optimizer_state.h>

namespace rarefy::pruning {

/// The packed mask of take(x, kept), from that of an x of `sizes`: the bits of the slices that stay, packed anew.
at::Tensor take_mask(const at::Tensor& mask, at::IntArrayRef sizes, const Kept& kept);

}  // namespace rarefy::pruning
