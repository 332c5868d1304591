#include <ATen/core/dispatch/Dispatcher.h>
#include <rarefy/ops/quantized.h>
#include <torch/library.h>

#include "ops/quantized_ops.h"

TORCH_LIBRARY_FRAGMENT(rarefy, m) {
  m.def(
      "quantized_linear(Tensor x, Tensor weight, Tensor weight_scale, Tensor? bias, Tensor input_scale, "
      "Tensor input_zero_point, int qmin, int qmax, bool relu, Tensor? output_scale=None, "
      "Tensor? output_zero_point=None, int output_qmin=0, int output_qmax=255) -> Tensor");
  m.def(
      "quantized_conv(Tensor x, Tensor weight, Tensor weight_scale, Tensor? bias, Tensor input_scale, "
      "Tensor input_zero_point, int qmin, int qmax, int[] stride, int[] padding, int[] dilation, int groups, bool relu, "
      "Tensor? output_scale=None, Tensor? output_zero_point=None, int output_qmin=0, int output_qmax=255) -> Tensor");
  m.def(
      "quantized_add(Tensor a, Tensor b, Tensor a_scale, Tensor a_zero_point, int a_qmin, int a_qmax, Tensor b_scale, "
      "Tensor b_zero_point, int b_qmin, int b_qmax, bool relu, Tensor? output_scale=None, "
      "Tensor? output_zero_point=None, int output_qmin=0, int output_qmax=255) -> Tensor");
  m.def(
      "requantize(Tensor x, Tensor scale, Tensor zero_point, int qmin, int qmax, Tensor? output_scale=None, "
      "Tensor? output_zero_point=None, int output_qmin=0, int output_qmax=255) -> Tensor");
  m.def(
      "max_pool2d_bytes(Tensor x, int[] kernel_size, int[] stride, int[] padding, int[] dilation, bool ceil_mode=False) "
      "-> Tensor");
}

namespace rarefy::ops {
namespace {

/// An optional grid as the arguments of an operator.
struct OutputArguments {
  std::optional<at::Tensor> scale, zero_point;
  int64_t qmin = 0, qmax = 255;

  explicit OutputArguments(const std::optional<ByteGrid>& grid) {
    if (grid.has_value()) {
      scale = grid->scale;
      zero_point = grid->zero_point;
      qmin = grid->qmin;
      qmax = grid->qmax;
    }
  }
};

}  // namespace

#define RAREFY_OP(name, Signature) \
  static const auto op = c10::Dispatcher::singleton().findSchemaOrThrow("rarefy::" #name, "").typed<Signature>()

at::Tensor quantized_linear(const at::Tensor& x, const at::Tensor& weight, const at::Tensor& weight_scale,
                            const std::optional<at::Tensor>& bias, const ByteGrid& input, bool relu,
                            const std::optional<ByteGrid>& output) {
  RAREFY_OP(quantized_linear, QuantizedLinearOp);
  const OutputArguments out(output);
  return op.call(x, weight, weight_scale, bias, input.scale, input.zero_point, input.qmin, input.qmax, relu, out.scale,
                 out.zero_point, out.qmin, out.qmax);
}

at::Tensor quantized_conv(const at::Tensor& x, const at::Tensor& weight, const at::Tensor& weight_scale,
                          const std::optional<at::Tensor>& bias, const ByteGrid& input, at::IntArrayRef stride,
                          at::IntArrayRef padding, at::IntArrayRef dilation, int64_t groups, bool relu,
                          const std::optional<ByteGrid>& output) {
  RAREFY_OP(quantized_conv, QuantizedConvOp);
  const OutputArguments out(output);
  return op.call(x, weight, weight_scale, bias, input.scale, input.zero_point, input.qmin, input.qmax, stride, padding,
                 dilation, groups, relu, out.scale, out.zero_point, out.qmin, out.qmax);
}

at::Tensor quantized_add(const at::Tensor& a, const at::Tensor& b, const ByteGrid& a_grid, const ByteGrid& b_grid,
                         bool relu, const std::optional<ByteGrid>& output) {
  RAREFY_OP(quantized_add, QuantizedAddOp);
  const OutputArguments out(output);
  return op.call(a, b, a_grid.scale, a_grid.zero_point, a_grid.qmin, a_grid.qmax, b_grid.scale, b_grid.zero_point,
                 b_grid.qmin, b_grid.qmax, relu, out.scale, out.zero_point, out.qmin, out.qmax);
}

at::Tensor requantize(const at::Tensor& x, const ByteGrid& input, const std::optional<ByteGrid>& output) {
  RAREFY_OP(requantize, RequantizeOp);
  const OutputArguments out(output);
  return op.call(x, input.scale, input.zero_point, input.qmin, input.qmax, out.scale, out.zero_point, out.qmin,
                 out.qmax);
}

at::Tensor max_pool2d_bytes(const at::Tensor& x, at::IntArrayRef kernel_size, at::IntArrayRef stride,
                            at::IntArrayRef padding, at::IntArrayRef dilation, bool ceil_mode) {
  RAREFY_OP(max_pool2d_bytes, decltype(max_pool2d_bytes));
  return op.call(x, kernel_size, stride, padding, dilation, ceil_mode);
}

}  // namespace rarefy::ops
