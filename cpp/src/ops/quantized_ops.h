// The signatures of the operators of integer inference, as the dispatcher has them.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <optional>

namespace rarefy::ops {

using OptionalTensor = std::optional<at::Tensor>;

using QuantizedLinearOp = at::Tensor(const at::Tensor& x, const at::Tensor& weight, const at::Tensor& weight_scale,
                                     const OptionalTensor& bias, const at::Tensor& input_scale,
                                     const at::Tensor& input_zero_point, int64_t qmin, int64_t qmax, bool relu,
                                     const OptionalTensor& output_scale, const OptionalTensor& output_zero_point,
                                     int64_t output_qmin, int64_t output_qmax);

using QuantizedConvOp = at::Tensor(const at::Tensor& x, const at::Tensor& weight, const at::Tensor& weight_scale,
                                   const OptionalTensor& bias, const at::Tensor& input_scale,
                                   const at::Tensor& input_zero_point, int64_t qmin, int64_t qmax,
                                   at::IntArrayRef stride, at::IntArrayRef padding, at::IntArrayRef dilation,
                                   int64_t groups, bool relu, const OptionalTensor& output_scale,
                                   const OptionalTensor& output_zero_point, int64_t output_qmin, int64_t output_qmax);

using QuantizedAddOp = at::Tensor(const at::Tensor& a, const at::Tensor& b, const at::Tensor& a_scale,
                                  const at::Tensor& a_zero_point, int64_t a_qmin, int64_t a_qmax,
                                  const at::Tensor& b_scale, const at::Tensor& b_zero_point, int64_t b_qmin,
                                  int64_t b_qmax, bool relu, const OptionalTensor& output_scale,
                                  const OptionalTensor& output_zero_point, int64_t output_qmin, int64_t output_qmax);

using RequantizeOp = at::Tensor(const at::Tensor& x, const at::Tensor& scale, const at::Tensor& zero_point,
                                int64_t qmin, int64_t qmax, const OptionalTensor& output_scale,
                                const OptionalTensor& output_zero_point, int64_t output_qmin, int64_t output_qmax);

/// The same on any device: the integers as float32, whose sums are exact up to 2^24, in torch's float kernels.
QuantizedLinearOp quantized_linear_anywhere;
QuantizedConvOp quantized_conv_anywhere;
QuantizedAddOp quantized_add_anywhere;
RequantizeOp requantize_anywhere;

}  // namespace rarefy::ops
