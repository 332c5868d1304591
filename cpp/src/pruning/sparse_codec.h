// Sparse tensors as bytes: packed bits or 2-bit indices, and the values that they keep. Elements are words of 1, 2, 4 or 8
// bytes; 0 and -0 are zero.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <functional>
#include <optional>
#include <vector>

namespace rarefy::pruning {

/// Takes a piece of what is being encoded.
using Sink = std::function<void(const void*, size_t)>;
/// Gives the next bytes of what is being decoded.
using Source = std::function<void(void*, size_t)>;

/// The packed mask of the elements that are not zero. `x` is contiguous and on the CPU, as in all functions here.
at::Tensor bits_of(const at::Tensor& x);

/// How many elements the packed mask `bits` of n elements keeps; -1 when its padding is not zero.
int64_t count_kept(const uint8_t* bits, int64_t n);

/// The flat index of the first element that `bits` prunes and that is not zero (-0 is one); -1 when there is none.
int64_t first_outside(const at::Tensor& x, const uint8_t* bits);

/// The axis along which each four neighbours have one bit (`exactly`) or at most one; unset when there is none. The last axis
/// is tried first, then axis 1.
std::optional<int64_t> one_of_four_axis(at::IntArrayRef shape, const uint8_t* bits, bool exactly);

/// A mask as a bool tensor of that shape.
at::Tensor unpacked(const uint8_t* bits, at::IntArrayRef shape);

/// Writes the elements that `bits` keeps.
void gather(const at::Tensor& x, const uint8_t* bits, const Sink& sink);
/// Reads them into `x`, which is zero.
void scatter(const at::Tensor& x, const uint8_t* bits, const Source& source);

/// The 2-bit indices of the bits: of groups without a bit, 0.
std::vector<uint8_t> indices_of(at::IntArrayRef shape, int64_t axis, const uint8_t* bits);
/// Bytes of the 2-bit indices of n elements.
inline int64_t index_bytes(int64_t n) { return (n / 4 + 3) / 4; }
/// The packed mask that indices stand for: one bit in every group.
at::Tensor bits_of_indices(at::IntArrayRef shape, int64_t axis, const uint8_t* indices);

/// Writes one element of each group, that of its index; -0 as it is, or as +0.
void gather_groups(const at::Tensor& x, int64_t axis, const uint8_t* indices, bool keep_negative_zero,
                   const Sink& sink);
/// Reads them into `x`, which is zero.
void scatter_groups(const at::Tensor& x, int64_t axis, const uint8_t* indices, const Source& source);

}  // namespace rarefy::pruning
