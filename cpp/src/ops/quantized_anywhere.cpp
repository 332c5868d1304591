// Integer inference on devices without kernels of their own (a GPU), and on processors whose products of bytes are not
// exact: the same integers as float32 numbers in torch's float kernels. Integers of 9 bits are exact in TF32 too, and so
// are their sums up to 2^24.
#include <ATen/ops/clamp.h>
#include <ATen/ops/constant_pad_nd.h>
#include <ATen/ops/conv1d.h>
#include <ATen/ops/conv2d.h>
#include <ATen/ops/conv3d.h>
#include <ATen/ops/linear.h>
#include <ATen/ops/max_pool2d.h>
#include <ATen/ops/nan_to_num.h>
#include <ATen/ops/relu.h>
#include <ATen/ops/round.h>
#include <torch/library.h>

#include "ops/quantized_checks.h"
#include "ops/quantized_ops.h"

namespace rarefy::ops {
namespace {

struct Grid {
  at::Tensor scale, zero_point;  // without dimensions
  int64_t qmin, qmax;

  Grid(const at::Tensor& scale_, const at::Tensor& zero_point_, int64_t qmin_, int64_t qmax_)
      : scale(scale_.reshape({})), zero_point(zero_point_.reshape({})), qmin(qmin_), qmax(qmax_) {}

  int64_t shift() const { return qmin < 0 ? 128 : 0; }

  /// The integers of x, as float32.
  at::Tensor integers(const at::Tensor& x) const {
    const auto q = at::clamp(at::round(x.to(at::kFloat) / scale) + zero_point, qmin, qmax);
    return at::nan_to_num(q, static_cast<double>(qmax));
  }
  at::Tensor bytes(const at::Tensor& x) const { return (integers(x) + shift()).to(at::kByte); }
  /// The integers less the zero point, as float32.
  at::Tensor centered(const at::Tensor& x) const {
    const auto q = x.scalar_type() == at::kByte ? x.to(at::kFloat) - shift() : integers(x);
    return q - zero_point;
  }
  at::Tensor values(const at::Tensor& x) const { return centered(x) * scale; }
};

at::Tensor finish(const at::Tensor& y_, bool relu, const OptionalTensor& scale, const OptionalTensor& zero_point,
                  int64_t qmin, int64_t qmax) {
  const auto y = relu ? at::relu(y_) : y_;
  return scale.has_value() ? Grid(*scale, *zero_point, qmin, qmax).bytes(y) : y;
}

/// sums * (input scale * weight scale) + bias, with the channels on axis `axis`.
at::Tensor scaled(const at::Tensor& sums, const at::Tensor& input_scale, const at::Tensor& weight_scale,
                  const OptionalTensor& bias, int64_t axis) {
  std::vector<int64_t> shape(static_cast<size_t>(sums.dim()), 1);
  shape[static_cast<size_t>(axis)] = -1;
  const auto y = sums * (input_scale.reshape({}) * weight_scale.reshape({-1})).view(shape);
  return bias.has_value() ? y + bias->view(shape) : y;
}

}  // namespace

at::Tensor quantized_linear_anywhere(const at::Tensor& x, const at::Tensor& weight, const at::Tensor& weight_scale,
                                     const OptionalTensor& bias, const at::Tensor& input_scale,
                                     const at::Tensor& input_zero_point, int64_t qmin, int64_t qmax, bool relu,
                                     const OptionalTensor& output_scale, const OptionalTensor& output_zero_point,
                                     int64_t output_qmin, int64_t output_qmax) {
  constexpr const char* function = "quantized_linear";
  check_quantized_linear(x, weight, weight_scale, bias);
  check_byte_grid(function, "input", x, input_scale, input_zero_point, qmin, qmax);
  check_output_grid(function, x, output_scale, output_zero_point, output_qmin, output_qmax);
  const Grid grid(input_scale, input_zero_point, qmin, qmax);
  const auto sums = at::linear(grid.centered(x), weight.to(at::kFloat));
  const auto y = scaled(sums, input_scale, weight_scale, bias, x.dim() - 1);
  return finish(y, relu, output_scale, output_zero_point, output_qmin, output_qmax);
}

at::Tensor quantized_conv_anywhere(const at::Tensor& x, const at::Tensor& weight, const at::Tensor& weight_scale,
                                   const OptionalTensor& bias, const at::Tensor& input_scale,
                                   const at::Tensor& input_zero_point, int64_t qmin, int64_t qmax,
                                   at::IntArrayRef stride, at::IntArrayRef padding, at::IntArrayRef dilation,
                                   int64_t groups, bool relu, const OptionalTensor& output_scale,
                                   const OptionalTensor& output_zero_point, int64_t output_qmin, int64_t output_qmax) {
  constexpr const char* function = "quantized_conv";
  check_quantized_conv(x, weight, weight_scale, bias, stride, padding, dilation, groups);
  check_byte_grid(function, "input", x, input_scale, input_zero_point, qmin, qmax);
  check_output_grid(function, x, output_scale, output_zero_point, output_qmin, output_qmax);
  const Sides sides(function, padding, stride.size());
  auto in = Grid(input_scale, input_zero_point, qmin, qmax).centered(x);
  auto before = sides.before;
  if (!sides.symmetric()) {
    in = at::constant_pad_nd(in, sides.reversed());
    before.assign(stride.size(), 0);
  }
  const auto w = weight.to(at::kFloat);
  const auto sums = weight.dim() == 3   ? at::conv1d(in, w, std::nullopt, stride, before, dilation, groups)
                    : weight.dim() == 4 ? at::conv2d(in, w, std::nullopt, stride, before, dilation, groups)
                                        : at::conv3d(in, w, std::nullopt, stride, before, dilation, groups);
  const auto y = scaled(sums, input_scale, weight_scale, bias, 1);
  return finish(y, relu, output_scale, output_zero_point, output_qmin, output_qmax).contiguous(conv_format(x, weight));
}

at::Tensor quantized_add_anywhere(const at::Tensor& a, const at::Tensor& b, const at::Tensor& a_scale,
                                  const at::Tensor& a_zero_point, int64_t a_qmin, int64_t a_qmax,
                                  const at::Tensor& b_scale, const at::Tensor& b_zero_point, int64_t b_qmin,
                                  int64_t b_qmax, bool relu, const OptionalTensor& output_scale,
                                  const OptionalTensor& output_zero_point, int64_t output_qmin, int64_t output_qmax) {
  constexpr const char* function = "quantized_add";
  check_quantized_add(a, b);
  check_byte_grid(function, "a", a, a_scale, a_zero_point, a_qmin, a_qmax);
  check_byte_grid(function, "b", a, b_scale, b_zero_point, b_qmin, b_qmax);
  check_output_grid(function, a, output_scale, output_zero_point, output_qmin, output_qmax);
  const auto sum =
      Grid(a_scale, a_zero_point, a_qmin, a_qmax).values(a) + Grid(b_scale, b_zero_point, b_qmin, b_qmax).values(b);
  return finish(sum, relu, output_scale, output_zero_point, output_qmin, output_qmax).contiguous(sum_format(a, b));
}

at::Tensor requantize_anywhere(const at::Tensor& x, const at::Tensor& scale, const at::Tensor& zero_point, int64_t qmin,
                               int64_t qmax, const OptionalTensor& output_scale,
                               const OptionalTensor& output_zero_point, int64_t output_qmin, int64_t output_qmax) {
  constexpr const char* function = "requantize";
  check_values(function, "input", x);
  check_byte_grid(function, "input", x, scale, zero_point, qmin, qmax);
  check_output_grid(function, x, output_scale, output_zero_point, output_qmin, output_qmax);
  return finish(Grid(scale, zero_point, qmin, qmax).values(x), false, output_scale, output_zero_point, output_qmin,
                output_qmax);
}

namespace {

at::Tensor max_pool2d_bytes_anywhere(const at::Tensor& x, at::IntArrayRef kernel_size, at::IntArrayRef stride,
                                     at::IntArrayRef padding, at::IntArrayRef dilation, bool ceil_mode) {
  check_max_pool2d(x, kernel_size, stride, padding, dilation, ceil_mode);
  return at::max_pool2d(x.to(at::kFloat), kernel_size, stride, padding, dilation, ceil_mode)
      .to(at::kByte)
      .contiguous(x.suggest_memory_format());
}

}  // namespace

TORCH_LIBRARY_IMPL(rarefy, CompositeExplicitAutograd, m) {
  m.impl("quantized_linear", &quantized_linear_anywhere);
  m.impl("quantized_conv", &quantized_conv_anywhere);
  m.impl("quantized_add", &quantized_add_anywhere);
  m.impl("requantize", &requantize_anywhere);
  m.impl("max_pool2d_bytes", &max_pool2d_bytes_anywhere);
}

}  // namespace rarefy::ops
