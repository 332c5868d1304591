// The operators below integer_linear and integer_conv: forward from bytes, and backward. Private.
#pragma once

#include <ATen/core/Tensor.h>

#include <array>
#include <cstdint>
#include <optional>
#include <tuple>

namespace rarefy::ops {

/// y [M, out] from bytes: q_x [M, in], uint8 or int8, q_w int8 [out, in] ([in, out] when transposed); and the packed mask of
/// not y <= 0 when relu (empty otherwise). x_scale float32 [1], x_zero_point int32 [1], w_scale float32 [1] or [out].
std::tuple<at::Tensor, at::Tensor> integer_linear_forward(const at::Tensor& q_x, const at::Tensor& q_w,
                                                          const at::Tensor& x_scale, const at::Tensor& x_zero_point,
                                                          const at::Tensor& w_scale,
                                                          const std::optional<at::Tensor>& bias, bool transposed,
                                                          bool relu, at::ScalarType dtype);

/// Gradients of x [M, in] and of the weight on its grid, float32 and contiguous; of shape [0] where not needed.
std::tuple<at::Tensor, at::Tensor> integer_linear_backward(const at::Tensor& grad, const at::Tensor& q_x,
                                                           const at::Tensor& q_w, const at::Tensor& x_scale,
                                                           const at::Tensor& x_zero_point, const at::Tensor& w_scale,
                                                           bool transposed, bool bf16, std::array<bool, 2> need);

/// The same for a convolution: q_x and y [N, channels, spatial...], channels-last in memory in any number of dimensions.
std::tuple<at::Tensor, at::Tensor> integer_conv_forward(const at::Tensor& q_x, const at::Tensor& q_w,
                                                        const at::Tensor& x_scale, const at::Tensor& x_zero_point,
                                                        const at::Tensor& w_scale,
                                                        const std::optional<at::Tensor>& bias, at::IntArrayRef stride,
                                                        at::IntArrayRef padding, at::IntArrayRef dilation,
                                                        int64_t groups, bool relu, at::ScalarType dtype);

/// Gradients with the strides of q_x and q_w.
std::tuple<at::Tensor, at::Tensor> integer_conv_backward(const at::Tensor& grad, const at::Tensor& q_x,
                                                         const at::Tensor& q_w, const at::Tensor& x_scale,
                                                         const at::Tensor& x_zero_point, const at::Tensor& w_scale,
                                                         at::IntArrayRef stride, at::IntArrayRef padding,
                                                         at::IntArrayRef dilation, int64_t groups, bool bf16,
                                                         std::array<bool, 2> need);

}  // namespace rarefy::ops
