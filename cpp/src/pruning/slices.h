#pragma once

#include <ATen/core/Tensor.h>
#include <rarefy/pruning/optimizer_state.h>

#include <vector>

namespace rarefy::pruning {

/// The slices of x that stay, in all dimensions at once: new memory, dense, in the order of the old (channels last,
/// transposed). Indices are ascending and in range. Sparse tensors are left to index_select.
at::Tensor take(const at::Tensor& x, const Kept& kept);

/// The inverse along one dimension: a tensor of `size` slices along dim that holds those of x at the places `kept` (ascending)
/// and fill[i] in every element of slice i elsewhere; zeros when `fill` is undefined.
at::Tensor spread(const at::Tensor& x, int64_t dim, const std::vector<int64_t>& kept, int64_t size,
                  const at::Tensor& fill);

}  // namespace rarefy::pruning
