// Bytes of a channels-last image as the rows of a matrix, one row per position of a convolution's result.
#pragma once

#include <ATen/core/Tensor.h>

#include <array>
#include <cstdint>
#include <vector>

namespace rarefy::ops {

/// A convolution's geometry in three spatial dimensions; lower ones are padded with ones in front.
struct ConvGeometry {
  int64_t batch, channels;
  std::array<int64_t, 3> in, out, kernel, stride, padding, dilation;

  ConvGeometry(at::IntArrayRef x, at::IntArrayRef weight, at::IntArrayRef stride, at::IntArrayRef padding,
               at::IntArrayRef dilation);
  /// Rows and columns of the matrix.
  int64_t positions() const { return batch * out[0] * out[1] * out[2]; }
  int64_t patch() const { return channels * kernel[0] * kernel[1] * kernel[2]; }
  /// The matrix is the image itself.
  bool is_pointwise() const;
};

/// [positions, kernel..., channels] bytes, `fill` where the patch lies outside of the image. q: channels-last in memory.
at::Tensor im2col(const at::Tensor& q, const ConvGeometry& geometry, uint8_t fill);

/// The transpose of im2col: float32 or bfloat16 rows [positions, patch] added up into a float32 image [batch, d, h, w,
/// channels], in the order of positions.
at::Tensor col2im(const at::Tensor& columns, const ConvGeometry& geometry);

}  // namespace rarefy::ops
