#pragma once

#include <ATen/core/Tensor.h>
#include <rarefy/export.h>

#include <cstdint>
#include <optional>

// Integer execution of a linear layer and of convolutions on LibTorch's oneDNN int8 kernels. Each is also
// torch.ops.rarefy.<name>. The input is quantized on the way in, multiplied and summed in integers (int8 or uint8 times
// int8, int32 sums), and scaled once on the way out (docs/dev/numerics.md, "Integer execution"):
//
//   out = (sum_k (q_x - zero_point) * q_w) * input_scale * weight_scale + bias,   then max(out, 0) when relu
//
// For inference: no gradient. CPU only.
namespace rarefy::ops {

/// A weight in the layout that the int8 kernel wants. weight: int8, [out, in]. The result is opaque and not serializable.
RAREFY_API at::Tensor pack_linear_weight(const at::Tensor& weight);

/// out: float32 [..., out].
///   x             floating point [..., in]
///   packed        of pack_linear_weight
///   weight_scale  float32 [out]          bias   float32 [out] or none
///   input_scale   float32, one element   input_zero_point   int32, one element, within [qmin, qmax]
///   qmin, qmax    range of the quantized input, inside int8 (qmin < 0) or uint8 (qmin >= 0)
/// Throws c10::ValueError or c10::TypeError for what does not fit.
RAREFY_API at::Tensor quantized_linear(const at::Tensor& x, const at::Tensor& packed, const at::Tensor& weight_scale,
                                       const std::optional<at::Tensor>& bias, const at::Tensor& input_scale,
                                       const at::Tensor& input_zero_point, int64_t qmin, int64_t qmax, bool relu);

/// The same for a convolution of 1, 2 or 3 dimensions (one value of stride, padding and dilation for each).
///   weight            int8, [out, in / groups, (kd, kh,) kw]        weight_scale   float32 [out]
///   input_size        [N, in, (D, H,) W] of the inputs to come: the kernel chooses its layout by it. Other sizes are right too,
///                     and can be slower (measured: 8.7 ms instead of 0.04 for 96 channels of 4x4 without it).
///   input_zero_point  as uint8: the zero point, plus 128 for a signed input
RAREFY_API at::Tensor pack_conv2d_weight(const at::Tensor& weight, const at::Tensor& weight_scale,
                                         at::IntArrayRef stride, at::IntArrayRef padding, at::IntArrayRef dilation,
                                         int64_t groups, at::IntArrayRef input_size, int64_t input_zero_point);

/// out: float32 [N, out, (d, h,) w], channels-last. x: floating point [N, in, (D, H,) W]; the zero padding is exact, as
/// quantization maps 0 to the zero point.
RAREFY_API at::Tensor quantized_conv2d(const at::Tensor& x, const at::Tensor& packed, const at::Tensor& weight_scale,
                                       const std::optional<at::Tensor>& bias, const at::Tensor& input_scale,
                                       const at::Tensor& input_zero_point, int64_t qmin, int64_t qmax,
                                       at::IntArrayRef stride, at::IntArrayRef padding, at::IntArrayRef dilation,
                                       int64_t groups, bool relu);

}  // namespace rarefy::ops
