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

/// x = +0 where the mask's bit is 0, in place, NaN and infinity included; elements that are kept are not touched.
///   x     any strides without internal overlap.      mask  uint8, ceil(x.numel() / 64) * 8 bytes, on x's device.
/// Not differentiable: throws c10::ValueError for an x that requires grad while gradients are being recorded.
RAREFY_API void apply_mask_(at::Tensor& x, const at::Tensor& mask);

/// How many of `elements` elements the mask prunes. Not an operator: reads the mask back from its device.
RAREFY_API int64_t pruned_count(const at::Tensor& mask, int64_t elements);

/// The mask of x that keeps every element. Not an operator.
RAREFY_API at::Tensor full_mask(const at::Tensor& x);

}  // namespace rarefy::ops
