#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <rarefy/ops/integer.h>
#include <torch/library.h>

#include "ops/integer_checks.h"
#include "ops/integer_ops.h"

namespace rarefy::ops {
namespace {

at::Tensor mask_for(const at::Tensor& y, bool relu) {
  return at::empty_symint({relu ? mask_bytes(y.sym_numel()) : c10::SymInt(0)}, y.options().dtype(at::kByte));
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> quantize_mask_meta(const at::Tensor& x, const at::Tensor& scale,
                                                                  const at::Tensor& zero_point,
                                                                  std::optional<int64_t> axis, int64_t qmin,
                                                                  int64_t qmax,
                                                                  const std::optional<at::Tensor>& multiplier) {
  check_quantize_mask("quantize_mask", x, scale, zero_point, axis, qmin, qmax, multiplier);
  return {at::empty_like(x, x.options().dtype(qmin < 0 ? at::kChar : at::kByte)), mask_for(x, true),
          at::empty_like(scale, scale.options().dtype(at::kFloat), at::MemoryFormat::Contiguous)};
}

at::Tensor gradient_or_none(bool need, const at::Tensor& like, at::MemoryFormat format) {
  const auto options = like.options().dtype(at::kFloat);
  return need ? at::empty_like(like, options, format) : at::empty_symint(c10::SymIntArrayRef{0}, options);
}

std::tuple<at::Tensor, at::Tensor> integer_linear_forward_meta(const at::Tensor& q_x, const at::Tensor& q_w,
                                                               const at::Tensor& x_scale,
                                                               const at::Tensor& x_zero_point,
                                                               const at::Tensor& w_scale,
                                                               const std::optional<at::Tensor>& bias, bool transposed,
                                                               bool relu, at::ScalarType dtype) {
  constexpr const char* function = "integer_linear_forward";
  check_linear_bytes(function, q_x, q_w, x_scale, x_zero_point, w_scale, transposed);
  const auto out = q_w.sym_size(transposed ? 1 : 0);
  check_bias(function, q_x, bias, out);
  check_result_type(function, dtype);
  auto y = at::empty_symint({q_x.sym_size(0), out}, q_x.options().dtype(dtype));
  return {y, mask_for(y, relu)};
}

std::tuple<at::Tensor, at::Tensor> integer_linear_backward_meta(const at::Tensor& grad, const at::Tensor& q_x,
                                                                const at::Tensor& q_w, const at::Tensor& x_scale,
                                                                const at::Tensor& x_zero_point,
                                                                const at::Tensor& w_scale, bool transposed, bool,
                                                                std::array<bool, 2> need) {
  constexpr const char* function = "integer_linear_backward";
  check_linear_bytes(function, q_x, q_w, x_scale, x_zero_point, w_scale, transposed);
  check_gradient(function, grad, c10::SymDimVector{q_x.sym_size(0), q_w.sym_size(transposed ? 1 : 0)}, q_x);
  return {gradient_or_none(need[0], q_x, at::MemoryFormat::Contiguous),
          gradient_or_none(need[1], q_w, at::MemoryFormat::Contiguous)};
}

c10::SymDimVector conv_sizes(const at::Tensor& q_x, const at::Tensor& q_w, at::IntArrayRef stride,
                             at::IntArrayRef padding, at::IntArrayRef dilation) {
  c10::SymDimVector sizes = {q_x.sym_size(0), q_w.sym_size(0)};
  for (int64_t d = 2; d < q_x.dim(); ++d) {
    const auto i = static_cast<size_t>(d - 2);
    sizes.push_back(conv_size(q_x.sym_size(d), q_w.sym_size(d), stride[i], padding[i], dilation[i]));
  }
  return sizes;
}

/// [N, C, spatial...] whose memory is [N, spatial..., C].
at::Tensor empty_channels_last(c10::SymDimVector sizes, const at::TensorOptions& options) {
  const auto channels = sizes[1];
  sizes.erase(sizes.begin() + 1);
  sizes.push_back(channels);
  return at::empty_symint(sizes, options).movedim(-1, 1);
}

std::tuple<at::Tensor, at::Tensor> integer_conv_forward_meta(
    const at::Tensor& q_x, const at::Tensor& q_w, const at::Tensor& x_scale, const at::Tensor& x_zero_point,
    const at::Tensor& w_scale, const std::optional<at::Tensor>& bias, at::IntArrayRef stride, at::IntArrayRef padding,
    at::IntArrayRef dilation, int64_t groups, bool relu, at::ScalarType dtype) {
  constexpr const char* function = "integer_conv_forward";
  check_conv_bytes(function, q_x, q_w, x_scale, x_zero_point, w_scale, stride, padding, dilation, groups);
  check_bias(function, q_x, bias, q_w.sym_size(0));
  check_result_type(function, dtype);
  auto y = empty_channels_last(conv_sizes(q_x, q_w, stride, padding, dilation), q_x.options().dtype(dtype));
  return {y, mask_for(y, relu)};
}

std::tuple<at::Tensor, at::Tensor> integer_conv_backward_meta(const at::Tensor& grad, const at::Tensor& q_x,
                                                              const at::Tensor& q_w, const at::Tensor& x_scale,
                                                              const at::Tensor& x_zero_point, const at::Tensor& w_scale,
                                                              at::IntArrayRef stride, at::IntArrayRef padding,
                                                              at::IntArrayRef dilation, int64_t groups, bool,
                                                              std::array<bool, 2> need) {
  constexpr const char* function = "integer_conv_backward";
  check_conv_bytes(function, q_x, q_w, x_scale, x_zero_point, w_scale, stride, padding, dilation, groups);
  check_gradient(function, grad, conv_sizes(q_x, q_w, stride, padding, dilation), q_x);
  return {gradient_or_none(need[0], q_x, at::MemoryFormat::Preserve),
          gradient_or_none(need[1], q_w, at::MemoryFormat::Preserve)};
}

}  // namespace

TORCH_LIBRARY_IMPL(rarefy, Meta, m) {
  m.impl("quantize_mask", &quantize_mask_meta);
  m.impl("integer_linear_forward", &integer_linear_forward_meta);
  m.impl("integer_linear_backward", &integer_linear_backward_meta);
  m.impl("integer_conv_forward", &integer_conv_forward_meta);
  m.impl("integer_conv_backward", &integer_conv_backward_meta);
}

}  // namespace rarefy::ops
