// LibTorch's int8 operators of oneDNN, which its C++ headers do not declare: reached through the dispatcher.
#pragma once

#include <ATen/core/List.h>
#include <ATen/core/Tensor.h>

#include <algorithm>
#include <cstdint>
#include <optional>

namespace rarefy::ops::onednn {

/// How a convolution moves. One of one dimension becomes one of two of height 1, which has a channels-last layout.
struct Movement {
  torch::List<int64_t> stride, padding, dilation;
  int64_t groups;

  /// Throws c10::ValueError unless each has `dims` values.
  Movement(const char* function, int64_t dims, at::IntArrayRef stride, at::IntArrayRef padding,
           at::IntArrayRef dilation, int64_t groups);
};

/// Whether this LibTorch has the operators.
bool is_available();

/// Whether `conv` gives the sums of this convolution. With one input channel in each group, oneDNN's int8 kernel reads memory
/// that nothing has written where
///   - a padding is at least as wide as the kernel, so that some windows lie in the padding alone, and the zero point is not
///     0: what it takes off for the padded places is set for windows that reach the image only;
///   - the result has width 1 and the horizontal stride is above 1.
/// Seen with LibTorch 2.13 on AVX-512 VNNI, at dilation 1; such shapes are rare, and refused at any dilation.
/// weight: [out, in / groups, kernel...]; output_width: of the result's last dimension.
inline bool convolves_exactly(const at::Tensor& weight, at::IntArrayRef stride, at::IntArrayRef padding,
                              int64_t zero_point, int64_t output_width) {
  if (weight.size(1) != 1) {
    return true;
  }
  if (output_width == 1 && stride.back() > 1) {
    return false;
  }
  const auto kernel = weight.sizes().slice(2);
  return zero_point == 0 ||
         std::equal(padding.begin(), padding.end(), kernel.begin(), [](int64_t p, int64_t k) { return p < k; });
}

/// [N, C, L] as [N, C, 1, L], without a copy; other tensors as they are.
at::Tensor with_height(const at::Tensor& x);

/// An int8 weight [out, in] packed for `linear`: an opaque tensor.
at::Tensor pack_linear(const at::Tensor& weight);

/// An int8 weight [out, in / groups, kernel...] packed for inputs of this size (4 or 5 values).
/// The packed layout does not depend on the values of the scales, of which there are one or `out`.
at::Tensor pack_conv(const at::Tensor& weight, const at::Tensor& weight_scale, const Movement& movement,
                     at::IntArrayRef input_size, int64_t input_zero_point);

/// (q - zero_point) * scale times weight * weight_scale, plus bias, then ReLU: float32. q uint8 or int8 [..., in].
at::Tensor linear(const at::Tensor& q, double scale, int64_t zero_point, const at::Tensor& packed,
                  const at::Tensor& weight_scale, const std::optional<at::Tensor>& bias, bool relu);

/// The same for a convolution. q: uint8, the only activation type of these kernels, channels-last, 4 or 5 dimensions.
at::Tensor conv(const at::Tensor& q, double scale, int64_t zero_point, const at::Tensor& packed,
                const at::Tensor& weight_scale, const std::optional<at::Tensor>& bias, const Movement& movement,
                bool relu);

}  // namespace rarefy::ops::onednn
