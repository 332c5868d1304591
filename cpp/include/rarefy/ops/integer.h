#pragma once

#include <ATen/core/Tensor.h>
#include <c10/core/ScalarType.h>
#include <rarefy/export.h>

#include <array>
#include <cstdint>
#include <optional>
#include <tuple>

// Layers of quantization-aware training whose forward pass runs in integers (docs/dev/numerics.md, "Integer execution").
// Each is also torch.ops.rarefy.<name>. Input and weight are quantized to bytes, multiplied and summed in int32, and scaled
// once; for the backward pass the bytes are saved, one bit per element of what was clamped, and nothing else:
//
//   q_x = quantize(x)   q_w = quantize(weight)   y = sum((q_x - x_zero_point) * q_w) * (x_scale * w_scale) + bias
//
// The gradient is that of the same layer over fake_quantize(x) and fake_quantize(weight): straight-through where a value
// was not clamped, 0 where it was; in float32, or in bfloat16 matrix products with float32 sums when asked for. There is no
// second derivative (simulated execution has one).
// A NaN in x makes every element of y NaN: an integer could not show it.
namespace rarefy::ops {

/// The most products of an 8-bit input and an 8-bit weight that int32 sums for sure: 65,793.
constexpr int64_t kLongestSum = 0x7fffffff / (255 * 128);

/// The grids of an input and a weight.
struct IntegerGrids {
  at::Tensor x_scale;       // float32 [1]
  at::Tensor x_zero_point;  // int32 [1]
  int64_t x_qmin, x_qmax;   // within int8 or uint8
  at::Tensor w_scale;       // float32 [1] or [out]
  at::Tensor w_zero_point;  // int32, zeros, shape of w_scale
  int64_t w_qmin, w_qmax;   // within int8
};

/// How the layer computes beside its grids.
struct IntegerOptions {
  /// max(y, 0) as part of the layer.
  bool relu = false;
  /// Matrix products of the backward pass in bfloat16.
  bool bf16_gradients = false;
  /// Type of y; unset: that of x, or autocast's where it is enabled.
  std::optional<at::ScalarType> dtype = std::nullopt;
};

/// x [..., in] and weight [out, in] ([in, out] when `transposed`) to y [..., out]. bias [out] or none.
/// Throws c10::ValueError or c10::TypeError for what does not fit.
RAREFY_API at::Tensor integer_linear(const at::Tensor& x, const at::Tensor& weight,
                                     const std::optional<at::Tensor>& bias, const IntegerGrids& grids, bool transposed,
                                     const IntegerOptions& options = {});

/// x [N, in, spatial...] and weight [out, in / groups, kernel...] to y [N, out, spatial...], in 1 to 3 dimensions, with zero
/// padding. y is channels-last when x or weight is, as torch's convolutions are.
///   multiplier  [out] or none: the weight that is quantized is weight * multiplier (channel by channel), and y is divided
///               by multiplier again: convolution with a folded batch normalization in training. A constant, not 0.
/// Throws as integer_linear; also for groups in three dimensions, which LibTorch has no integer kernel for.
RAREFY_API at::Tensor integer_conv(const at::Tensor& x, const at::Tensor& weight,
                                   const std::optional<at::Tensor>& multiplier, const std::optional<at::Tensor>& bias,
                                   const IntegerGrids& grids, at::IntArrayRef stride, at::IntArrayRef padding,
                                   at::IntArrayRef dilation, int64_t groups, const IntegerOptions& options = {});

/// The bytes of x * multiplier (one value per channel of `axis`, or none for 1), the packed mask of what was not clamped
/// (as fake_quantize_mask), and the scale that was used: a copy of `scale`, all NaN when x held a NaN. Not differentiable.
RAREFY_API std::tuple<at::Tensor, at::Tensor, at::Tensor> quantize_mask(const at::Tensor& x, const at::Tensor& scale,
                                                                        const at::Tensor& zero_point,
                                                                        std::optional<int64_t> axis, int64_t qmin,
                                                                        int64_t qmax,
                                                                        const std::optional<at::Tensor>& multiplier);

/// Whether integer matrix products are exact on this machine's processor: products of uint8 and int8 are summed in 16 bits,
/// and can saturate, where the processor has no dot-product instructions (AVX512-VNNI, AVX-VNNI, ARM's dot product).
RAREFY_API bool has_exact_integer_products();

}  // namespace rarefy::ops
