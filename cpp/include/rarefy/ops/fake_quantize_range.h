#pragma once

#include <ATen/core/Tensor.h>
#include <rarefy/export.h>

#include <cstdint>
#include <optional>
#include <tuple>

// Fake quantization between learned ends: what LSQ+, PACT and a learned bit width are made of.
namespace rarefy::ops {

/// x_hat = scale * clamp(round_half_even(x / scale), round_half_even(low / scale), round_half_even(high / scale)), with gradients
/// for x, the scale and both ends. With g the upstream gradient, summed over the channel (over the tensor, where axis is unset),
///
///   dx     = g where low <= x <= high, else 0, NaN included
///   dscale = gradient_scale * sum of g * (round_half_even(x / scale) - x / scale)    where low <= x <= high
///   dlow   = gradient_scale * sum of g                                               where x < low, -infinity included
///   dhigh  = gradient_scale * sum of g                                               where x > high, infinity included
///
/// so x_hat counts as low or high where it is clamped, and a parameter that scale and ends are computed from gets its gradient by
/// the chain rule. A NaN in x stays NaN and leaves the parameters alone.
///   x               floating point, any shape and layout; computed in float32, float64 in float64
///   scale, low, high  float32, [1] or one per index of axis; scale > 0, low <= 0 <= high
/// There is no second derivative: asking for one throws c10::NotImplementedError.
/// Throws c10::ValueError, c10::TypeError and c10::IndexError for a wrong shape, type or axis, and on the CPU a c10::ValueError for
/// a scale that is not finite and positive.
RAREFY_API at::Tensor fake_quantize_range(const at::Tensor& x, const at::Tensor& scale, const at::Tensor& low,
                                          const at::Tensor& high, std::optional<int64_t> axis,
                                          double gradient_scale = 1.0);

/// (dx, dscale, dlow, dhigh) for the upstream gradient `grad`, which has x's dtype and shape. Of
/// float32 and shorter types the sums on the CPU are made in an order that shape and strides alone decide, most of it in float64.
/// Not differentiable.
RAREFY_API std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> fake_quantize_range_backward(
    const at::Tensor& grad, const at::Tensor& x, const at::Tensor& scale, const at::Tensor& low, const at::Tensor& high,
    std::optional<int64_t> axis, double gradient_scale);

}  // namespace rarefy::ops
