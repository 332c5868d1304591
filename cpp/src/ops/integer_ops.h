// The operators below integer_linear and integer_conv: forward from bytes, and backward. Private.
#pragma once

#include <ATen/core/Tensor.h>

#include <array>
#include <cstdint>
#include <optional>
#include <tuple>

namespace rarefy::ops {

/// y [M, out] from bytes: q_x [M, in], uint8 or int8, q_w int8 [out, in] ([in, out] when transposed); and the packed mask of
/// y > 0 when relu (empty otherwise).
std::tuple<at::Tensor, at::Tensor> integer_linear_forward(const at::Tensor& q_x, const at::Tensor& q_w,
                                                          const at::Tensor& x_scale, const at::Tensor& x_zero_point,
                                                          const at::Tensor& w_scale,
                                                          const std::optional<at::Tensor>& bias, bool transposed,
                                                          bool relu, at::ScalarType dtype);

/// Gradients of x [M, in] and of the weight on its grid, undefined where not needed.
std::tuple<at::Tensor, at::Tensor> integer_linear_backward(const at::Tensor& grad, const at::Tensor& q_x,
                                                           const at::Tensor& q_w, const at::Tensor& x_scale,
                                                           const at::Tensor& x_zero_point, const at::Tensor& w_scale,
                                                           bool transposed, bool bf16, std::array<bool, 2> need);

/// The same for a convolution; q_x [N, in, spatial...] channels-last.
std::tuple<at::Tensor, at::Tensor> integer_conv_forward(const at::Tensor& q_x, const at::Tensor& q_w,
                                                        const at::Tensor& x_scale, const at::Tensor& x_zero_point,
                                                        const at::Tensor& w_scale,
                                                        const std::optional<at::Tensor>& bias, at::IntArrayRef stride,
                                                        at::IntArrayRef padding, at::IntArrayRef dilation,
                                                        int64_t groups, bool relu, at::ScalarType dtype);

std::tuple<at::Tensor, at::Tensor> integer_conv_backward(const at::Tensor& grad, const at::Tensor& q_x,
                                                         const at::Tensor& q_w, const at::Tensor& x_scale,
                                                         const at::Tensor& x_zero_point, const at::Tensor& w_scale,
                                                         at::IntArrayRef stride, at::IntArrayRef padding,
                                                         at::IntArrayRef dilation, int64_t groups, bool bf16,
                                                         std::array<bool, 2> need);

/// The gradient of the multiplier m, [out]. With u = q_w * scale, which is the weight on its grid divided by m (scale: [out]
/// after that division), and grad = dL/du: sum(grad * (passed * w - u)) / m per channel, where passed is the mask.
at::Tensor integer_multiplier_backward(const at::Tensor& grad, const at::Tensor& mask, const at::Tensor& weight,
                                       const at::Tensor& q_w, const at::Tensor& scale, const at::Tensor& multiplier);

/// Sizes of a convolution's result.
inline std::vector<int64_t> conv_sizes(at::IntArrayRef x, at::IntArrayRef weight, at::IntArrayRef stride,
                                       at::IntArrayRef padding, at::IntArrayRef dilation) {
  std::vector<int64_t> sizes = {x[0], weight[0]};
  for (size_t d = 0; d + 2 < x.size(); ++d) {
    sizes.push_back((x[d + 2] + 2 * padding[d] - dilation[d] * (weight[d + 2] - 1) - 1) / stride[d] + 1);
  }
  return sizes;
}

}  // namespace rarefy::ops
