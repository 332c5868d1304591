#include <ATen/core/dispatch/Dispatcher.h>
#include <rarefy/ops/quantized_linear.h>
#include <torch/library.h>

TORCH_LIBRARY_FRAGMENT(rarefy, m) {
  m.def("pack_linear_weight(Tensor weight) -> Tensor");
  m.def(
      "quantized_linear(Tensor x, Tensor packed, Tensor weight_scale, Tensor? bias, Tensor input_scale, "
      "Tensor input_zero_point, int qmin, int qmax, bool relu) -> Tensor");
  m.def(
      "pack_conv2d_weight(Tensor weight, Tensor weight_scale, int[] stride, int[] padding, int[] dilation, "
      "int groups, int[] input_size, int input_zero_point) -> Tensor");
  m.def(
      "quantized_conv2d(Tensor x, Tensor packed, Tensor weight_scale, Tensor? bias, Tensor input_scale, "
      "Tensor input_zero_point, int qmin, int qmax, int[] stride, int[] padding, int[] dilation, int groups, "
      "bool relu) -> Tensor");
}

namespace rarefy::ops {

#define RAREFY_OP(name) \
  static const auto op = c10::Dispatcher::singleton().findSchemaOrThrow("rarefy::" #name, "").typed<decltype(name)>()

at::Tensor pack_linear_weight(const at::Tensor& weight) {
  RAREFY_OP(pack_linear_weight);
  return op.call(weight);
}

at::Tensor quantized_linear(const at::Tensor& x, const at::Tensor& packed, const at::Tensor& weight_scale,
                            const std::optional<at::Tensor>& bias, const at::Tensor& input_scale,
                            const at::Tensor& input_zero_point, int64_t qmin, int64_t qmax, bool relu) {
  RAREFY_OP(quantized_linear);
  return op.call(x, packed, weight_scale, bias, input_scale, input_zero_point, qmin, qmax, relu);
}

at::Tensor pack_conv2d_weight(const at::Tensor& weight, const at::Tensor& weight_scale, at::IntArrayRef stride,
                              at::IntArrayRef padding, at::IntArrayRef dilation, int64_t groups,
                              at::IntArrayRef input_size, int64_t input_zero_point) {
  RAREFY_OP(pack_conv2d_weight);
  return op.call(weight, weight_scale, stride, padding, dilation, groups, input_size, input_zero_point);
}

at::Tensor quantized_conv2d(const at::Tensor& x, const at::Tensor& packed, const at::Tensor& weight_scale,
                            const std::optional<at::Tensor>& bias, const at::Tensor& input_scale,
                            const at::Tensor& input_zero_point, int64_t qmin, int64_t qmax, at::IntArrayRef stride,
                            at::IntArrayRef padding, at::IntArrayRef dilation, int64_t groups, bool relu) {
  RAREFY_OP(quantized_conv2d);
  return op.call(x, packed, weight_scale, bias, input_scale, input_zero_point, qmin, qmax, stride, padding, dilation,
                 groups, relu);
}

}  // namespace rarefy::ops
