#pragma once

#include <ATen/core/Tensor.h>
#include <rarefy/export.h>
#include <rarefy/ops/integer.h>
#include <rarefy/ops/quantized.h>

#include <cstdint>
#include <optional>
#include <vector>

// Transposed convolutions in integers (docs/dev/numerics.md, "Transposed convolutions in integers"). Each is also
// torch.ops.rarefy.<name>. Output positions that are congruent modulo the stride are one ordinary convolution of stride 1 over
// the input, with the taps of the kernel that reach them: the result is prod(stride) such convolutions side by side, with no
// product more than the transposed convolution has, and every sum in int32.
namespace rarefy::ops {

/// How a transposed convolution moves over its output; a value for each dimension. padding is what is cut off on both
/// sides of the result, output_padding what is added behind; each is less than the larger of stride and dilation.
struct TransposedMovement {
  std::vector<int64_t> stride, padding, output_padding, dilation;
  int64_t groups = 1;
};

/// The weight of a transposed convolution, [in, out / groups, kernel...], as [in / groups, out, kernel...]: axis 1 has an
/// index for each output channel, whatever the groups, so that it is the axis of scales per channel. A view without groups.
RAREFY_API at::Tensor weight_by_channel(const at::Tensor& weight, int64_t groups);
/// The inverse of weight_by_channel.
RAREFY_API at::Tensor weight_by_group(const at::Tensor& weight, int64_t groups);

/// The transposed convolution of integer_conv: x [N, in, spatial...] and weight [in, out / groups, kernel...] to y [N, out,
/// spatial...], in 1 to 3 dimensions. grids.w_scale has one element, or one for each of the `out` channels: that of group g
/// and channel o of the group is number g * (out / groups) + o. Input and weight are rounded where they are multiplied; the
/// gradient is that of the transposed convolution over fake_quantize of both.
/// Throws c10::ValueError or c10::TypeError for what does not fit, and for groups in three dimensions.
RAREFY_API at::Tensor integer_conv_transpose(const at::Tensor& x, const at::Tensor& weight,
                                             const std::optional<at::Tensor>& bias, const IntegerGrids& grids,
                                             const TransposedMovement& movement, const IntegerOptions& options = {});

/// The transposed convolution of quantized_conv: weight int8 [in, out / groups, kernel...], weight_scale of one element or
/// [out], with bytes or floating point on both sides. There is no gradient.
RAREFY_API at::Tensor quantized_conv_transpose(const at::Tensor& x, const at::Tensor& weight,
                                               const at::Tensor& weight_scale, const std::optional<at::Tensor>& bias,
                                               const ByteGrid& input, const TransposedMovement& movement,
                                               bool relu = false, const std::optional<ByteGrid>& output = std::nullopt);

}  // namespace rarefy::ops
