#pragma once

#include <ATen/core/Tensor.h>
#include <rarefy/export.h>

#include <cstdint>
#include <optional>

// Linear layers whose weight [out, in] is mostly zero: single weights in compressed sparse rows (CSR), or blocks of them (BCSR).
namespace rarefy::ops {

/// A sparse weight.
struct SparseWeight {
  /// What is kept, float32 or bfloat16: [kept] for single weights, [blocks, height, width] for blocks.
  at::Tensor values;
  /// Of each value the column, of each block the column of blocks (its first column / width): int16 or int32.
  at::Tensor columns;
  /// Where each row (of blocks) begins in values, and the end: int64 [rows + 1].
  at::Tensor row_offsets;
};

/// y = x W^T + bias, W sparse: x [..., in] to [..., out], of the type of the values.
/// Also torch.ops.rarefy.sparse_linear(x, values, columns, row_offsets, bias=None) in Python. On the CPU.
///
/// Sums are in float32 in the order of the columns, four interleaved ones (16 for a batch of one), with no fused
/// multiply-add; bfloat16 is rounded once, at the end. So the bits are the same for every number of threads and instruction
/// set. A weight that is not there is no product: 0 * infinity does not become NaN, as it would in a dense layer.
///
/// For inference: a backward pass throws. Throws c10::TypeError for wrong types; c10::ValueError for shapes that do not fit and
/// for columns or offsets beyond the weight.
RAREFY_API at::Tensor sparse_linear(const at::Tensor& x, const SparseWeight& weight,
                                    const std::optional<at::Tensor>& bias = std::nullopt);

/// The sparse form of a dense weight [out, in], float32 or bfloat16, with blocks of height x width (1 x 1: single weights): every
/// block with an element that is not zero, in full. Columns are int16 where they fit. Not an operator.
/// Throws c10::ValueError for a size that is not a multiple of the block's.
RAREFY_API SparseWeight to_sparse_weight(const at::Tensor& weight, int64_t height = 1, int64_t width = 1);

/// The dense weight [out, in] again.
RAREFY_API at::Tensor to_dense_weight(const SparseWeight& weight, int64_t in_features);

}  // namespace rarefy::ops
