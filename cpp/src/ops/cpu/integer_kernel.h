// What the integer kernels of the CPU share: bytes to floats, sums to results, gradients in bfloat16.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <optional>
#include <tuple>
#include <vector>

namespace rarefy::ops {

/// The values of a tensor of any type, rounded to float32.
std::vector<float> floats(const at::Tensor& values);

/// One value for each of n channels: the n values, or the only one n times.
std::vector<float> per_channel(const at::Tensor& values, int64_t n);

/// (q - zero_point) * scale as float32 or bfloat16, in q's layout. scale: one value, or one per index of `axis`.
at::Tensor dequantize(const at::Tensor& q, const std::vector<float>& scale, int32_t zero_point, int64_t axis,
                      at::ScalarType type);

/// a [M, K] times the transpose of `rows` [N, K], exactly: int32 [M, N]. a: uint8 or int8, rows: int8, both contiguous.
at::Tensor multiply_bytes(const at::Tensor& a, const at::Tensor& rows);
/// The same into `out`.
void multiply_bytes_into(at::Tensor& out, const at::Tensor& a, const at::Tensor& rows);

/// Everything that turns rows of sums into results: y = float(sum - x_zero_point * sum(weight)) * (x_scale * w_scale) + bias.
class Epilogue {
 public:
  /// rows: the weight as int8 [out, in], contiguous.
  Epilogue(const at::Tensor& rows, const at::Tensor& x_scale, const at::Tensor& x_zero_point, const at::Tensor& w_scale,
           const std::optional<at::Tensor>& bias);

  /// sums: int32 [M, out], contiguous, whose memory the result takes over where it can. Also the packed mask of not y <= 0, empty
  /// unless relu.
  std::tuple<at::Tensor, at::Tensor> apply(const at::Tensor& sums, bool relu, at::ScalarType dtype) const;

 private:
  std::vector<int32_t> offset_;
  std::vector<float> scale_;
  std::vector<float> bias_;
};

/// The packed mask of not y <= 0, of a dense float32 y.
at::Tensor positive_mask(const at::Tensor& y);

/// grad times a value per column, in bfloat16: columns are the fastest axis in memory. grad is dense.
at::Tensor scale_to_bf16(const at::Tensor& grad, const std::vector<float>& scale);

/// bfloat16 [rows, ...] times a value per row, in float32 and the same layout; rows lie one after the other in memory.
at::Tensor scale_rows(const at::Tensor& x, const std::vector<float>& scale);

/// What undoes, in the gradient of the weight, that grad was scaled by the weight's scale and x was left as integers.
std::vector<float> weight_gradient_scale(const std::vector<float>& w_scale, const at::Tensor& x_scale);

}  // namespace rarefy::ops
