#pragma once

#include <ATen/core/Tensor.h>
#include <rarefy/export.h>

#include <cstdint>
#include <optional>
#include <vector>

// Packed pruning masks: one bit per element, 1 = kept, 0 = pruned. Element i in logical (contiguous) order, whatever
// the strides, is bit i % 8 of byte i / 8 of a one-dimensional uint8 tensor, padded with zero bits to whole 64-bit
// words. So a mask means the same for a channels-last weight, and its number of 1 bits is the number of kept elements.
//
// Every function here is also torch.ops.rarefy.<name> in Python. Weights are float32, float64, bfloat16 or float16. A
// wrong value or shape throws c10::ValueError, a wrong dtype c10::TypeError, and then nothing has changed.
namespace rarefy::ops {

/// Masks that prune exactly round_half_even(sparsity * total) elements of smallest magnitude over all weights together.
///   weights   any shapes, one device; one tensor gives local pruning, all of a model's weights give global pruning.
///   sparsity  in [0, 1).
///   masks     unset, or one existing mask per weight: what is pruned there stays pruned and counts towards the number;
///             when more than that is pruned already, the masks come back unchanged.
/// Of equal magnitudes the earlier ones are pruned, in the order of `weights` and then of elements: the result is what
/// a stable ascending sort of |w| gives. Infinity is the largest magnitude; -0 equals 0. Throws c10::ValueError for a
/// NaN, naming the tensor and the flat index. The threshold is found by selection on the bits of |w|, reading the
/// weights about twice, with no sort and no copy of contiguous weights. Results do not depend on the number of threads
/// or the instruction set.
RAREFY_API std::vector<at::Tensor> magnitude_mask(at::TensorList weights, double sparsity,
                                                  std::optional<at::TensorList> masks = std::nullopt);

/// magnitude_mask over scores that may have either sign: exactly round_half_even(sparsity * total) elements with the
/// lowest scores are pruned. -0 equals 0, -infinity is the lowest. On devices other than the CPU by a stable sort.
RAREFY_API std::vector<at::Tensor> score_mask(at::TensorList scores, double sparsity,
                                              std::optional<at::TensorList> masks = std::nullopt);

/// The mask that keeps the n largest of every m consecutive elements along one dimension.
///   x          of one or more dimensions, any strides.      n, m   1 <= n < m <= x.size(dim).
///   dim        the dimension along which groups run; the last group is shorter when m does not divide its size, and
///              keeps at most n too.
///   mask       what is pruned there stays pruned, and counts: a group whose mask keeps n or fewer is unchanged.
///   magnitude  true: largest |x|; false: largest x.
/// Of equal elements the earlier ones are pruned. Throws c10::ValueError for a NaN and for n and m out of range,
/// c10::IndexError for a dimension that x does not have. With m = 4 along contiguous elements of float32, bfloat16 or
/// float16 and no mask, x is read once, in vectors.
RAREFY_API at::Tensor nm_mask(const at::Tensor& x, int64_t n, int64_t m, int64_t dim = 1,
                              const std::optional<at::Tensor>& mask = std::nullopt, bool magnitude = true);

/// The packed mask of a bool tensor of any shape and strides: true = kept.
RAREFY_API at::Tensor pack_mask(const at::Tensor& kept);

/// The bool tensor of a packed mask: true = kept. Throws c10::ValueError when the mask is not one of that many elements.
RAREFY_API at::Tensor unpack_mask(const at::Tensor& mask, at::IntArrayRef size);

/// x = +0 where the mask's bit is 0, in place, NaN and infinity included; elements that are kept are not touched.
///   x     any strides without internal overlap.      mask  uint8, ceil(x.numel() / 64) * 8 bytes, on x's device.
/// Not differentiable: throws c10::ValueError for an x that requires grad while gradients are being recorded.
RAREFY_API void apply_mask_(at::Tensor& x, const at::Tensor& mask);

/// How many of `elements` elements the mask prunes. Not an operator: reads the mask back from its device.
RAREFY_API int64_t pruned_count(const at::Tensor& mask, int64_t elements);

/// The mask of x that keeps every element. Not an operator.
RAREFY_API at::Tensor full_mask(const at::Tensor& x);

}  // namespace rarefy::ops
