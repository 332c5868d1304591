#pragma once

#include <ATen/core/Tensor.h>
#include <rarefy/export.h>

#include <tuple>

// max(x, 0), saving one bit per element for the backward pass instead of the result. Each is also torch.ops.rarefy.<name>.
// x: floating point (float32, float64, bfloat16, float16), any shape; channels-last is kept. Another dtype throws
// c10::TypeError. NaN gives NaN and lets its gradient pass, as torch's ReLU does.
namespace rarefy::ops {

/// max(x, 0), with gradient grad where not x <= 0, and 0 elsewhere.
RAREFY_API at::Tensor relu(const at::Tensor& x);

/// The same written into x, with the same gradient.
RAREFY_API void relu_(at::Tensor& x);

/// max(x, 0) and the packed mask of not x <= 0, in the form of fake_quantize_mask. Not differentiable.
RAREFY_API std::tuple<at::Tensor, at::Tensor> relu_mask(const at::Tensor& x);

}  // namespace rarefy::ops
