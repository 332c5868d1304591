#pragma once

#include <ATen/core/Tensor.h>
#include <rarefy/pruning/optimizer_state.h>

namespace rarefy::pruning {

/// The slices of x that stay, in all dimensions at once: new memory, dense, in the order of the old (channels last,
/// transposed). Indices are ascending and in range. Sparse tensors are left to index_select.
at::Tensor take(const at::Tensor& x, const Kept& kept);

}  // namespace rarefy::pruning
