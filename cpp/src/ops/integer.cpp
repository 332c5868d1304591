#include <ATen/core/dispatch/Dispatcher.h>
#include <rarefy/ops/integer.h>
#include <torch/library.h>

#include "ops/integer_ops.h"

TORCH_LIBRARY_FRAGMENT(rarefy, m) {
  m.def(
      "quantize_mask(Tensor x, Tensor scale, Tensor zero_point, int? axis, int qmin, int qmax, Tensor? multiplier) "
      "-> (Tensor, Tensor, Tensor)");
  m.def(
      "integer_linear_forward(Tensor q_x, Tensor q_w, Tensor x_scale, Tensor x_zero_point, Tensor w_scale, "
      "Tensor? bias, bool transposed, bool relu, ScalarType dtype) -> (Tensor, Tensor)");
  m.def(
      "integer_linear_backward(Tensor grad, Tensor q_x, Tensor q_w, Tensor x_scale, Tensor x_zero_point, "
      "Tensor w_scale, bool transposed, bool bf16, bool[2] need) -> (Tensor, Tensor)");
  m.def(
      "integer_conv_forward(Tensor q_x, Tensor q_w, Tensor x_scale, Tensor x_zero_point, Tensor w_scale, Tensor? bias, "
      "int[] stride, int[] padding, int[] dilation, int groups, bool relu, ScalarType dtype) -> (Tensor, Tensor)");
  m.def(
      "integer_conv_backward(Tensor grad, Tensor q_x, Tensor q_w, Tensor x_scale, Tensor x_zero_point, Tensor w_scale, "
      "int[] stride, int[] padding, int[] dilation, int groups, bool bf16, bool[2] need) -> (Tensor, Tensor)");
  m.def(
      "integer_linear(Tensor x, Tensor weight, Tensor? bias, Tensor x_scale, Tensor x_zero_point, int x_qmin, "
      "int x_qmax, Tensor w_scale, Tensor w_zero_point, int w_qmin, int w_qmax, bool transposed, bool relu, "
      "bool bf16_gradients, ScalarType? dtype) -> Tensor");
  m.def(
      "integer_conv(Tensor x, Tensor weight, Tensor? multiplier, Tensor? bias, Tensor x_scale, Tensor x_zero_point, "
      "int x_qmin, int x_qmax, Tensor w_scale, Tensor w_zero_point, int w_qmin, int w_qmax, int[] stride, "
      "int[] padding, int[] dilation, int groups, bool relu, bool bf16_gradients, ScalarType? dtype) -> Tensor");
}

namespace rarefy::ops {

#define RAREFY_OP(name, ...) \
  static const auto op = c10::Dispatcher::singleton().findSchemaOrThrow("rarefy::" #name, "").typed<__VA_ARGS__>()

std::tuple<at::Tensor, at::Tensor, at::Tensor> quantize_mask(const at::Tensor& x, const at::Tensor& scale,
                                                             const at::Tensor& zero_point, std::optional<int64_t> axis,
                                                             int64_t qmin, int64_t qmax,
                                                             const std::optional<at::Tensor>& multiplier) {
  RAREFY_OP(quantize_mask, decltype(quantize_mask));
  return op.call(x, scale, zero_point, axis, qmin, qmax, multiplier);
}

std::tuple<at::Tensor, at::Tensor> integer_linear_forward(const at::Tensor& q_x, const at::Tensor& q_w,
                                                          const at::Tensor& x_scale, const at::Tensor& x_zero_point,
                                                          const at::Tensor& w_scale,
                                                          const std::optional<at::Tensor>& bias, bool transposed,
                                                          bool relu, at::ScalarType dtype) {
  RAREFY_OP(integer_linear_forward, decltype(integer_linear_forward));
  return op.call(q_x, q_w, x_scale, x_zero_point, w_scale, bias, transposed, relu, dtype);
}

std::tuple<at::Tensor, at::Tensor> integer_linear_backward(const at::Tensor& grad, const at::Tensor& q_x,
                                                           const at::Tensor& q_w, const at::Tensor& x_scale,
                                                           const at::Tensor& x_zero_point, const at::Tensor& w_scale,
                                                           bool transposed, bool bf16, std::array<bool, 2> need) {
  RAREFY_OP(integer_linear_backward, decltype(integer_linear_backward));
  return op.call(grad, q_x, q_w, x_scale, x_zero_point, w_scale, transposed, bf16, need);
}

std::tuple<at::Tensor, at::Tensor> integer_conv_forward(const at::Tensor& q_x, const at::Tensor& q_w,
                                                        const at::Tensor& x_scale, const at::Tensor& x_zero_point,
                                                        const at::Tensor& w_scale,
                                                        const std::optional<at::Tensor>& bias, at::IntArrayRef stride,
                                                        at::IntArrayRef padding, at::IntArrayRef dilation,
                                                        int64_t groups, bool relu, at::ScalarType dtype) {
  RAREFY_OP(integer_conv_forward, decltype(integer_conv_forward));
  return op.call(q_x, q_w, x_scale, x_zero_point, w_scale, bias, stride, padding, dilation, groups, relu, dtype);
}

std::tuple<at::Tensor, at::Tensor> integer_conv_backward(const at::Tensor& grad, const at::Tensor& q_x,
                                                         const at::Tensor& q_w, const at::Tensor& x_scale,
                                                         const at::Tensor& x_zero_point, const at::Tensor& w_scale,
                                                         at::IntArrayRef stride, at::IntArrayRef padding,
                                                         at::IntArrayRef dilation, int64_t groups, bool bf16,
                                                         std::array<bool, 2> need) {
  RAREFY_OP(integer_conv_backward, decltype(integer_conv_backward));
  return op.call(grad, q_x, q_w, x_scale, x_zero_point, w_scale, stride, padding, dilation, groups, bf16, need);
}

at::Tensor integer_linear(const at::Tensor& x, const at::Tensor& weight, const std::optional<at::Tensor>& bias,
                          const IntegerGrids& grids, bool transposed, const IntegerOptions& options) {
  RAREFY_OP(integer_linear,
            at::Tensor(const at::Tensor&, const at::Tensor&, const std::optional<at::Tensor>&, const at::Tensor&,
                       const at::Tensor&, int64_t, int64_t, const at::Tensor&, const at::Tensor&, int64_t, int64_t,
                       bool, bool, bool, std::optional<at::ScalarType>));
  return op.call(x, weight, bias, grids.x_scale, grids.x_zero_point, grids.x_qmin, grids.x_qmax, grids.w_scale,
                 grids.w_zero_point, grids.w_qmin, grids.w_qmax, transposed, options.relu, options.bf16_gradients,
                 options.dtype);
}

at::Tensor integer_conv(const at::Tensor& x, const at::Tensor& weight, const std::optional<at::Tensor>& multiplier,
                        const std::optional<at::Tensor>& bias, const IntegerGrids& grids, at::IntArrayRef stride,
                        at::IntArrayRef padding, at::IntArrayRef dilation, int64_t groups,
                        const IntegerOptions& options) {
  RAREFY_OP(integer_conv,
            at::Tensor(const at::Tensor&, const at::Tensor&, const std::optional<at::Tensor>&,
                       const std::optional<at::Tensor>&, const at::Tensor&, const at::Tensor&, int64_t, int64_t,
                       const at::Tensor&, const at::Tensor&, int64_t, int64_t, at::IntArrayRef, at::IntArrayRef,
                       at::IntArrayRef, int64_t, bool, bool, std::optional<at::ScalarType>));
  return op.call(x, weight, multiplier, bias, grids.x_scale, grids.x_zero_point, grids.x_qmin, grids.x_qmax,
                 grids.w_scale, grids.w_zero_point, grids.w_qmin, grids.w_qmax, stride, padding, dilation, groups,
                 options.relu, options.bf16_gradients, options.dtype);
}

}  // namespace rarefy::ops
