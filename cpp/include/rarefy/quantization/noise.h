#pragma once

#include <ATen/core/Tensor.h>
#include <rarefy/export.h>
#include <rarefy/quantization/scheme.h>

namespace rarefy::quantization {

/// What training computes with in place of `rounded`, as scheme.noise says. torch.ops.rarefy.quantization_noise is the same with the
/// scheme as JSON.
///   x        any shape, floating point
///   rounded  x as the scheme rounds it, with its gradient: of x's shape and type
///   scale    the one with which it was rounded, in the shape that scheme.scale_shape gives; read for uniform noise alone
/// Uniform: a value that was not clamped becomes x + scale * u, u even in [-1/2, 1/2), and the gradient stays that of rounded. Then each
/// value is left at x with probability 1 - share, and its gradient passes as it is. Drawn from torch's generator of the device.
/// Throws c10::ValueError for a scheme without noise, or shapes that differ.
RAREFY_API at::Tensor quantization_noise(const at::Tensor& x, const at::Tensor& rounded, const at::Tensor& scale,
                                         const Scheme& scheme);

}  // namespace rarefy::quantization
