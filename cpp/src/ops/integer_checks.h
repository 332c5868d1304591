// The argument rules of integer execution, applied by every backend's kernel and before anything is computed.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/Exception.h>
#include <rarefy/ops/integer.h>

#include <cstdint>
#include <optional>

#include "ops/fake_quantize_checks.h"

namespace rarefy::ops {

inline void check_sum_length(const char* function, const c10::SymInt& products) {
  TORCH_CHECK_VALUE(products <= kLongestSum, "[", function, "] an int32 sum must have at most ", kLongestSum,
                    " products of bytes, got ", products);
}

inline void check_result_type(const char* function, at::ScalarType type) {
  TORCH_CHECK_TYPE(type == at::kFloat || type == at::kBFloat16 || type == at::kHalf, "[", function,
                   "] dtype must be float32, bfloat16 or float16, got ", type);
}

/// Returns the resolved axis, -1 for none.
inline int64_t check_quantize_mask(const char* function, const at::Tensor& x, const at::Tensor& scale,
                                   const at::Tensor& zero_point, std::optional<int64_t> axis, int64_t qmin,
                                   int64_t qmax, const std::optional<at::Tensor>& multiplier) {
  const int64_t resolved = check_fake_quantize(function, x, scale, zero_point, axis, qmin, qmax);
  check_quantized_type(function, qmin, qmax);
  if (multiplier.has_value()) {
    check_float(function, *multiplier, "multiplier");
    check_per_axis(function, x, resolved, *multiplier, "multiplier");
  }
  return resolved;
}

inline void check_device(const char* function, const at::Tensor& x, const at::Tensor& parameter, const char* name) {
  TORCH_CHECK_VALUE(parameter.device() == x.device(), "[", function, "] ", name, " must be on the input's device ",
                    x.device(), ", got ", parameter.device());
}

inline void check_bias(const char* function, const at::Tensor& x, const std::optional<at::Tensor>& bias,
                       const c10::SymInt& out_channels) {
  if (!bias.has_value()) {
    return;
  }
  check_float(function, *bias, "bias");
  TORCH_CHECK_VALUE(bias->dim() == 1 && bias->sym_size(0) == out_channels, "[", function, "] bias must have shape [",
                    out_channels, "], got ", bias->sym_sizes());
  check_device(function, x, *bias, "bias");
}

/// The grids that bytes are on.
inline void check_parameters(const char* function, const at::Tensor& q_x, const at::Tensor& x_scale,
                             const at::Tensor& x_zero_point, const at::Tensor& w_scale,
                             const c10::SymInt& out_channels) {
  TORCH_CHECK_TYPE(x_scale.scalar_type() == at::kFloat && w_scale.scalar_type() == at::kFloat, "[", function,
                   "] x_scale and w_scale must be float32, got ", x_scale.scalar_type(), " and ",
                   w_scale.scalar_type());
  TORCH_CHECK_TYPE(x_zero_point.scalar_type() == at::kInt, "[", function, "] x_zero_point must be int32, got ",
                   x_zero_point.scalar_type());
  TORCH_CHECK_VALUE(x_scale.sym_numel() == 1 && x_zero_point.sym_numel() == 1, "[", function,
                    "] x_scale and x_zero_point must have 1 element, got ", x_scale.sym_numel(), " and ",
                    x_zero_point.sym_numel());
  TORCH_CHECK_VALUE(w_scale.dim() <= 1 && (w_scale.sym_numel() == 1 || w_scale.sym_numel() == out_channels), "[",
                    function, "] w_scale must have 1 or ", out_channels, " elements, got shape ", w_scale.sym_sizes());
  check_device(function, q_x, x_scale, "x_scale");
  check_device(function, q_x, x_zero_point, "x_zero_point");
  check_device(function, q_x, w_scale, "w_scale");
}

inline void check_bytes(const char* function, const at::Tensor& q_x, const at::Tensor& q_w) {
  TORCH_CHECK_TYPE(q_x.scalar_type() == at::kByte || q_x.scalar_type() == at::kChar, "[", function,
                   "] q_x must be uint8 or int8, got ", q_x.scalar_type());
  TORCH_CHECK_TYPE(q_w.scalar_type() == at::kChar, "[", function, "] q_w must be int8, got ", q_w.scalar_type());
  TORCH_CHECK_VALUE(q_w.sym_numel() > 0, "[", function, "] weight must not be empty, got shape ", q_w.sym_sizes());
  check_device(function, q_x, q_w, "q_w");
}

inline void check_linear_bytes(const char* function, const at::Tensor& q_x, const at::Tensor& q_w,
                               const at::Tensor& x_scale, const at::Tensor& x_zero_point, const at::Tensor& w_scale,
                               bool transposed) {
  TORCH_CHECK_VALUE(q_x.dim() == 2 && q_w.dim() == 2, "[", function, "] q_x and q_w must have 2 dimensions, got ",
                    q_x.dim(), " and ", q_w.dim());
  check_bytes(function, q_x, q_w);
  const auto features = q_w.sym_size(transposed ? 0 : 1);
  TORCH_CHECK_VALUE(q_x.sym_size(1) == features, "[", function, "] q_x must have ", features, " columns, got shape ",
                    q_x.sym_sizes());
  check_sum_length(function, features);
  check_parameters(function, q_x, x_scale, x_zero_point, w_scale, q_w.sym_size(transposed ? 1 : 0));
}

/// Size of a convolution's result along one axis; the window fits in the padded input.
template <typename Int>
Int conv_size(const Int& in, const Int& kernel, int64_t stride, int64_t padding, int64_t dilation) {
  return (in + 2 * padding - dilation * (kernel - 1) - 1) / stride + 1;
}

/// An input (or its bytes) and a weight of a convolution, and how it moves.
inline void check_geometry(const char* function, const at::Tensor& x, const at::Tensor& weight, at::IntArrayRef stride,
                           at::IntArrayRef padding, at::IntArrayRef dilation, int64_t groups) {
  TORCH_CHECK_VALUE(weight.dim() >= 3 && weight.dim() <= 5, "[", function,
                    "] weight must have 3 to 5 dimensions, got shape ", weight.sym_sizes());
  TORCH_CHECK_VALUE(groups > 0 && weight.sym_size(0) % groups == 0, "[", function, "] groups must divide ",
                    weight.sym_size(0), " output channels, got ", groups);
  TORCH_CHECK_VALUE(x.dim() == weight.dim() && x.sym_size(1) == weight.sym_size(1) * groups, "[", function,
                    "] input must have ", weight.dim(), " dimensions and ", weight.sym_size(1) * groups,
                    " channels, got shape ", x.sym_sizes());
  const auto spatial = static_cast<size_t>(weight.dim() - 2);
  TORCH_CHECK_VALUE(stride.size() == spatial && padding.size() == spatial && dilation.size() == spatial, "[", function,
                    "] stride, padding and dilation must have ", spatial, " values, got ", stride.size(), ", ",
                    padding.size(), " and ", dilation.size());
  c10::SymInt products = weight.sym_size(1);
  for (size_t i = 0; i < spatial; ++i) {
    const auto d = static_cast<int64_t>(i) + 2;
    TORCH_CHECK_VALUE(x.sym_size(d) > 0, "[", function, "] input must not be empty beside its batch, got shape ",
                      x.sym_sizes());
    TORCH_CHECK_VALUE(stride[i] > 0 && padding[i] >= 0 && dilation[i] > 0, "[", function,
                      "] stride and dilation must be positive and padding not negative, got ", stride, ", ", dilation,
                      " and ", padding);
    const auto window = dilation[i] * (weight.sym_size(d) - 1) + 1;
    TORCH_CHECK_VALUE(x.sym_size(d) + 2 * padding[i] >= window, "[", function,
                      "] the padded input must hold a window of ", window, " along axis ", d, ", got ",
                      x.sym_size(d) + 2 * padding[i]);
    products = products * weight.sym_size(d);
  }
  check_sum_length(function, products);
}

inline void check_conv_bytes(const char* function, const at::Tensor& q_x, const at::Tensor& q_w,
                             const at::Tensor& x_scale, const at::Tensor& x_zero_point, const at::Tensor& w_scale,
                             at::IntArrayRef stride, at::IntArrayRef padding, at::IntArrayRef dilation,
                             int64_t groups) {
  check_bytes(function, q_x, q_w);
  check_geometry(function, q_x, q_w, stride, padding, dilation, groups);
  check_parameters(function, q_x, x_scale, x_zero_point, w_scale, q_w.sym_size(0));
}

inline void check_gradient(const char* function, const at::Tensor& grad, c10::SymIntArrayRef sizes,
                           const at::Tensor& q_x) {
  check_float(function, grad, "grad");
  TORCH_CHECK_VALUE(grad.sym_sizes() == sizes, "[", function, "] grad must have shape ", sizes, ", got ",
                    grad.sym_sizes());
  check_device(function, q_x, grad, "grad");
}

}  // namespace rarefy::ops
