#pragma once

#include <ATen/core/Tensor.h>
#include <rarefy/export.h>

#include <cstdint>
#include <optional>
#include <tuple>

// Fake quantization whose scale is learned (LSQ: Esser et al., 2020, arXiv:1902.08153). Arguments, types, NaN and infinity
// are those of rarefy/ops/fake_quantize.h; only the scale differs: float32, and it may require a gradient.
namespace rarefy::ops {

/// x_hat, in the bits of fake_quantize, with gradients for x and for the scale. With g the upstream gradient and
/// q = round_half_even(x / scale) + zero_point before it is clamped,
///
///   dx     = g                                                 where qmin <= q <= qmax, else 0, NaN included
///   dscale = gradient_scale * sum over the channel of g * t    (over the tensor, where axis is unset)
///   t      = round_half_even(x / scale) - x / scale            where qmin <= q <= qmax
///            clamp(q, qmin, qmax) - zero_point                 where q is beyond that, infinities included
///            0, whatever g is                                  where x is NaN
///
/// gradient_scale is any finite number; the paper takes 1 / sqrt(elements per channel * qmax). zero_point is a constant.
/// Saves x and the parameters, no mask. dscale is added up in an order that the shape and the strides alone decide, most
/// of it in float64 (docs/dev/numerics.md): on the CPU it does not depend on the number of threads or the instruction set.
/// There is no second derivative: asking for one throws c10::NotImplementedError.
/// Throws c10::ValueError, c10::TypeError and c10::IndexError as fake_quantize does, a TypeError for a scale that is not
/// float32 and a ValueError for a gradient_scale that is not finite.
RAREFY_API at::Tensor fake_quantize_learned(const at::Tensor& x, const at::Tensor& scale, const at::Tensor& zero_point,
                                            std::optional<int64_t> axis, int64_t qmin, int64_t qmax,
                                            double gradient_scale);

/// (dx, dscale) of fake_quantize_learned for the upstream gradient `grad`, which has x's dtype and shape; one pass that
/// reads both once. dx has x's strides, dscale is float32 in the scale's shape. Not differentiable.
/// torch.ops.rarefy.fake_quantize_learned_backward_(grad, x, ...) overwrites a grad of x's strides with dx and returns dscale.
RAREFY_API std::tuple<at::Tensor, at::Tensor> fake_quantize_learned_backward(
    const at::Tensor& grad, const at::Tensor& x, const at::Tensor& scale, const at::Tensor& zero_point,
    std::optional<int64_t> axis, int64_t qmin, int64_t qmax, double gradient_scale);

}  // namespace rarefy::ops
