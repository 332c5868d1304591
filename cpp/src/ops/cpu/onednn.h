// LibTorch's int8 operators of oneDNN, which its C++ headers do not declare: reached through the dispatcher.
#pragma once

#include <ATen/core/List.h>
#include <ATen/core/Tensor.h>

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
