#include <ATen/ExpandUtils.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <torch/library.h>

#include "ops/quantized_checks.h"
#include "ops/quantized_ops.h"

namespace rarefy::ops {
namespace {

at::TensorOptions result_options(const at::Tensor& x, bool bytes) {
  return x.options().dtype(bytes ? at::kByte : at::kFloat);
}

at::Tensor quantized_linear_meta(const at::Tensor& x, const at::Tensor& weight, const at::Tensor& weight_scale,
                                 const OptionalTensor& bias, const at::Tensor& input_scale,
                                 const at::Tensor& input_zero_point, int64_t qmin, int64_t qmax, bool /*relu*/,
                                 const OptionalTensor& output_scale, const OptionalTensor& output_zero_point,
                                 int64_t output_qmin, int64_t output_qmax) {
  constexpr const char* function = "quantized_linear";
  check_quantized_linear(x, weight, weight_scale, bias);
  check_byte_grid(function, "input", x, input_scale, input_zero_point, qmin, qmax);
  const bool bytes = check_output_grid(function, x, output_scale, output_zero_point, output_qmin, output_qmax);
  c10::SymDimVector sizes(x.sym_sizes().begin(), x.sym_sizes().end());
  sizes.back() = weight.sym_size(0);
  return at::empty_symint(sizes, result_options(x, bytes));
}

at::Tensor quantized_conv_meta(const at::Tensor& x, const at::Tensor& weight, const at::Tensor& weight_scale,
                               const OptionalTensor& bias, const at::Tensor& input_scale,
                               const at::Tensor& input_zero_point, int64_t qmin, int64_t qmax, at::IntArrayRef stride,
                               at::IntArrayRef padding, at::IntArrayRef dilation, int64_t groups, bool /*relu*/,
                               const OptionalTensor& output_scale, const OptionalTensor& output_zero_point,
                               int64_t output_qmin, int64_t output_qmax) {
  constexpr const char* function = "quantized_conv";
  const auto sizes = check_quantized_conv(x, weight, weight_scale, bias, stride, padding, dilation, groups);
  check_byte_grid(function, "input", x, input_scale, input_zero_point, qmin, qmax);
  const bool bytes = check_output_grid(function, x, output_scale, output_zero_point, output_qmin, output_qmax);
  return at::empty_symint(sizes, result_options(x, bytes), conv_format(x, weight));
}

at::Tensor quantized_add_meta(const at::Tensor& a, const at::Tensor& b, const at::Tensor& a_scale,
                              const at::Tensor& a_zero_point, int64_t a_qmin, int64_t a_qmax, const at::Tensor& b_scale,
                              const at::Tensor& b_zero_point, int64_t b_qmin, int64_t b_qmax, bool /*relu*/,
                              const OptionalTensor& output_scale, const OptionalTensor& output_zero_point,
                              int64_t output_qmin, int64_t output_qmax) {
  constexpr const char* function = "quantized_add";
  check_quantized_add(a, b);
  check_byte_grid(function, "a", a, a_scale, a_zero_point, a_qmin, a_qmax);
  check_byte_grid(function, "b", a, b_scale, b_zero_point, b_qmin, b_qmax);
  const bool bytes = check_output_grid(function, a, output_scale, output_zero_point, output_qmin, output_qmax);
  return at::empty_symint(at::infer_size_symdimvector(a.sym_sizes(), b.sym_sizes()), result_options(a, bytes),
                          sum_format(a, b));
}

at::Tensor requantize_meta(const at::Tensor& x, const at::Tensor& scale, const at::Tensor& zero_point, int64_t qmin,
                           int64_t qmax, const OptionalTensor& output_scale, const OptionalTensor& output_zero_point,
                           int64_t output_qmin, int64_t output_qmax) {
  constexpr const char* function = "requantize";
  check_values(function, "input", x);
  check_byte_grid(function, "input", x, scale, zero_point, qmin, qmax);
  const bool bytes = check_output_grid(function, x, output_scale, output_zero_point, output_qmin, output_qmax);
  return at::empty_like(x, result_options(x, bytes));
}

at::Tensor max_pool2d_bytes_meta(const at::Tensor& x, at::IntArrayRef kernel_size, at::IntArrayRef stride,
                                 at::IntArrayRef padding, at::IntArrayRef dilation, bool ceil_mode) {
  const auto sizes = check_max_pool2d(x, kernel_size, stride, padding, dilation, ceil_mode);
  return at::empty_symint(sizes, x.options(), x.suggest_memory_format());
}

}  // namespace

TORCH_LIBRARY_IMPL(rarefy, Meta, m) {
  m.impl("quantized_linear", &quantized_linear_meta);
  m.impl("quantized_conv", &quantized_conv_meta);
  m.impl("quantized_add", &quantized_add_meta);
  m.impl("requantize", &requantize_meta);
  m.impl("max_pool2d_bytes", &max_pool2d_bytes_meta);
}

}  // namespace rarefy::ops
