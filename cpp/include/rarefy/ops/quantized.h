#pragma once

#include <ATen/core/Tensor.h>
#include <rarefy/export.h>

#include <cstdint>
#include <optional>

// Integer execution for inference, with bytes between layers. Each is also torch.ops.rarefy.<name>, with the members of a
// ByteGrid as arguments of their own. On the CPU by LibTorch's oneDNN int8 kernels, anywhere else by float kernels on
// the same integers (docs/dev/numerics.md, "Integer execution").
//
// A value that a layer hands on is either a float tensor, or a uint8 tensor that lies on a grid which both sides know. Bytes are
// always uint8: the integer q of a grid with qmin < 0 is stored as q + 128. So a layer takes, as its input,
//   floating point   which it rounds to its input grid, or
//   uint8            which is on its input grid already,
// and gives float32, or with an output grid the bytes of what quantizing that float32 result would give, exactly.
// There is no gradient.
namespace rarefy::ops {

/// An affine grid of 8 bits or fewer: (q - zero_point) * scale for integers q in [qmin, qmax].
struct ByteGrid {
  at::Tensor scale;       // float32, one element
  at::Tensor zero_point;  // int32, one element, within [qmin, qmax]
  int64_t qmin = 0;       // inside int8 (qmin < 0) or uint8 (qmin >= 0)
  int64_t qmax = 255;
};

/// y = (sum_k (q_x - zero_point) * q_w) * (input scale * weight_scale) + bias, then max(y, 0) when relu: [..., out].
///   x             floating point or uint8 [..., in]
///   weight        int8 [out, in]. The CPU keeps it packed for its kernel from the first call on, as long as the weight lives
///                 and until it is written to (packed_weight_count).
///   weight_scale  float32, [out] or one element
///   bias          float32 [out] or none
/// Throws c10::ValueError or c10::TypeError for what does not fit.
RAREFY_API at::Tensor quantized_linear(const at::Tensor& x, const at::Tensor& weight, const at::Tensor& weight_scale,
                                       const std::optional<at::Tensor>& bias, const ByteGrid& input, bool relu = false,
                                       const std::optional<ByteGrid>& output = std::nullopt);

/// The same for a convolution of 1, 2 or 3 dimensions: [N, out, (d, h,) w] of [N, in, (D, H,) W].
///   weight    int8 [out, in / groups, (kd, kh,) kw]
///   stride, dilation   a value for each dimension
///   padding   a value for each dimension, or two, before and after; exact, as the zero point stands for 0
/// The result is channels-last where x or weight is, as torch's convolution has it.
RAREFY_API at::Tensor quantized_conv(const at::Tensor& x, const at::Tensor& weight, const at::Tensor& weight_scale,
                                     const std::optional<at::Tensor>& bias, const ByteGrid& input,
                                     at::IntArrayRef stride, at::IntArrayRef padding, at::IntArrayRef dilation,
                                     int64_t groups, bool relu = false,
                                     const std::optional<ByteGrid>& output = std::nullopt);

/// The sum of two tensors, each on its grid, then max(y, 0) when relu. Shapes broadcast.
RAREFY_API at::Tensor quantized_add(const at::Tensor& a, const at::Tensor& b, const ByteGrid& a_grid,
                                    const ByteGrid& b_grid, bool relu = false,
                                    const std::optional<ByteGrid>& output = std::nullopt);

/// The values of x on the grid `input`, as bytes on the grid `output` or as float32: from floating point to bytes
/// (both grids the same), from bytes to floating point, and from one grid to another.
RAREFY_API at::Tensor requantize(const at::Tensor& x, const ByteGrid& input,
                                 const std::optional<ByteGrid>& output = std::nullopt);

/// The largest byte of each window: uint8 [N, C, h, w] of uint8 [N, C, H, W], in the layout of x. As torch's max_pool2d, which
/// takes no bytes of large channels-last images; on a grid it is the largest value.
///   kernel_size, stride, padding, dilation   2 values each; padding at most half of the kernel's size
///   ceil_mode                                round the result's size up
RAREFY_API at::Tensor max_pool2d_bytes(const at::Tensor& x, at::IntArrayRef kernel_size, at::IntArrayRef stride,
                                       at::IntArrayRef padding, at::IntArrayRef dilation, bool ceil_mode = false);

/// Weights that the CPU kernels keep packed. Those whose tensor is gone are dropped first, as every new one does too; and
/// of more than 8192, the least recently used.
RAREFY_API int64_t packed_weight_count();
/// Drops all of them; they are packed again when they are needed.
RAREFY_API void clear_packed_weights();

}  // namespace rarefy::ops
