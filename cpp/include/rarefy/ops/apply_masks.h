#pragma once

#include <ATen/core/Tensor.h>
#include <rarefy/export.h>

// Packed masks (rarefy/ops/mask.h) over many tensors in one call: what holds zeros in a training step. Both functions are
// also torch.ops.rarefy.<name> in Python. Tensors are float32, float64, bfloat16 or float16 of any strides without internal
// overlap; mask i belongs to tensor i, holds ceil(n / 64) * 8 bytes and is on its device. A wrong value or shape throws
// c10::ValueError, a wrong dtype c10::TypeError, and then nothing has changed.
namespace rarefy::ops {

/// apply_mask_() for each tensor: +0 where the mask's bit is 0. Stretches that a mask keeps whole are not read, and what is
/// kept is not changed. The work of all tensors is divided among the threads together. Not differentiable: throws
/// c10::ValueError for a tensor that requires grad while gradients are being recorded.
RAREFY_API void apply_masks_(at::TensorList tensors, at::TensorList masks);

/// What left the masks: int64 [tensors, 2], of each tensor how many elements are pruned and not zero (NaN counts, -0 does
/// not), and the first such index in logical order, -1 when there is none. Reads only, and only where masks prune.
RAREFY_API at::Tensor stray_values(at::TensorList tensors, at::TensorList masks);

}  // namespace rarefy::ops
