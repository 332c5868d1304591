#include <ATen/core/dispatch/Dispatcher.h>
#include <rarefy/ops/formats.h>
#include <torch/library.h>

TORCH_LIBRARY_FRAGMENT(rarefy, m) {
  m.def(
      "fake_quantize_group(Tensor x, Tensor scale, Tensor zero_point, int? axis, SymInt[] block, int qmin, int qmax, "
      "bool clipped=True, Tensor? seed=None) -> Tensor");
  m.def(
      "cast_minifloat(Tensor x, Tensor scale, int? axis, SymInt[] block, int exponent_bits, int mantissa_bits, int bias, "
      "str specials, bool saturate=True, bool clipped=True, Tensor? seed=None) -> Tensor");
  m.def(
      "fake_quantize_group_backward(Tensor grad, Tensor x, Tensor scale, Tensor zero_point, int? axis, SymInt[] block, "
      "int qmin, int qmax) -> Tensor");
  m.def(
      "cast_minifloat_backward(Tensor grad, Tensor x, Tensor scale, int? axis, SymInt[] block, int exponent_bits, "
      "int mantissa_bits, int bias, str specials) -> Tensor");
  m.def(
      "group_qparams(Tensor x, int? axis, SymInt[] block, int qmin, int qmax, bool symmetric, bool power_of_two=False) -> "
      "(Tensor, Tensor)");
  m.def(
      "fake_quantize_dynamic(Tensor x, int? axis, SymInt[] block, int qmin, int qmax, bool symmetric, "
      "bool power_of_two=False) -> Tensor");
  m.def(
      "minifloat_scale(Tensor x, int? axis, SymInt[] block, int exponent_bits, int mantissa_bits, int bias, str specials, "
      "bool power_of_two=False) -> Tensor");
  m.def(
      "cast_minifloat_dynamic(Tensor x, int? axis, SymInt[] block, int exponent_bits, int mantissa_bits, int bias, "
      "str specials, bool power_of_two=False) -> Tensor");
  m.def("mx_scale(Tensor x, str element, int block=32, int axis=-1) -> Tensor");
  m.def("fake_quantize_mx(Tensor x, str element, int block=32, int axis=-1) -> Tensor");
  m.def("nvfp4_tensor_scale(Tensor x) -> Tensor");
  m.def("nvfp4_scale(Tensor x, Tensor tensor_scale, int block=16, int axis=-1) -> Tensor");
  m.def("fake_quantize_nvfp4(Tensor x, Tensor? tensor_scale=None, int block=16, int axis=-1) -> Tensor");
  m.def("nf4_scale(Tensor x, int block=64, int scale_block=0, int axis=-1) -> Tensor");
  m.def("fake_quantize_nf4(Tensor x, int block=64, int scale_block=0, int axis=-1) -> Tensor");
  m.def("block_range(Tensor x, int? axis, SymInt[] block) -> (Tensor, Tensor)");
}

namespace rarefy::ops {
#define RAREFY_OP(name) \
  static const auto op = c10::Dispatcher::singleton().findSchemaOrThrow("rarefy::" #name, "").typed<decltype(name)>()

at::Tensor fake_quantize_group(const at::Tensor& x, const at::Tensor& scale, const at::Tensor& zero_point,
                               std::optional<int64_t> axis, c10::SymIntArrayRef block, int64_t qmin, int64_t qmax,
                               bool clipped, const std::optional<at::Tensor>& seed) {
  RAREFY_OP(fake_quantize_group);
  return op.call(x, scale, zero_point, axis, block, qmin, qmax, clipped, seed);
}

at::Tensor cast_minifloat(const at::Tensor& x, const at::Tensor& scale, std::optional<int64_t> axis,
                          c10::SymIntArrayRef block, int64_t exponent_bits, int64_t mantissa_bits, int64_t bias,
                          c10::string_view specials, bool saturate, bool clipped,
                          const std::optional<at::Tensor>& seed) {
  RAREFY_OP(cast_minifloat);
  return op.call(x, scale, axis, block, exponent_bits, mantissa_bits, bias, specials, saturate, clipped, seed);
}

at::Tensor fake_quantize_group_backward(const at::Tensor& grad, const at::Tensor& x, const at::Tensor& scale,
                                        const at::Tensor& zero_point, std::optional<int64_t> axis,
                                        c10::SymIntArrayRef block, int64_t qmin, int64_t qmax) {
  RAREFY_OP(fake_quantize_group_backward);
  return op.call(grad, x, scale, zero_point, axis, block, qmin, qmax);
}

at::Tensor cast_minifloat_backward(const at::Tensor& grad, const at::Tensor& x, const at::Tensor& scale,
                                   std::optional<int64_t> axis, c10::SymIntArrayRef block, int64_t exponent_bits,
                                   int64_t mantissa_bits, int64_t bias, c10::string_view specials) {
  RAREFY_OP(cast_minifloat_backward);
  return op.call(grad, x, scale, axis, block, exponent_bits, mantissa_bits, bias, specials);
}

std::tuple<at::Tensor, at::Tensor> group_qparams(const at::Tensor& x, std::optional<int64_t> axis,
                                                 c10::SymIntArrayRef block, int64_t qmin, int64_t qmax, bool symmetric,
                                                 bool power_of_two) {
  RAREFY_OP(group_qparams);
  return op.call(x, axis, block, qmin, qmax, symmetric, power_of_two);
}

at::Tensor fake_quantize_dynamic(const at::Tensor& x, std::optional<int64_t> axis, c10::SymIntArrayRef block,
                                 int64_t qmin, int64_t qmax, bool symmetric, bool power_of_two) {
  RAREFY_OP(fake_quantize_dynamic);
  return op.call(x, axis, block, qmin, qmax, symmetric, power_of_two);
}

at::Tensor minifloat_scale(const at::Tensor& x, std::optional<int64_t> axis, c10::SymIntArrayRef block,
                           int64_t exponent_bits, int64_t mantissa_bits, int64_t bias, c10::string_view specials,
                           bool power_of_two) {
  RAREFY_OP(minifloat_scale);
  return op.call(x, axis, block, exponent_bits, mantissa_bits, bias, specials, power_of_two);
}

at::Tensor cast_minifloat_dynamic(const at::Tensor& x, std::optional<int64_t> axis, c10::SymIntArrayRef block,
                                  int64_t exponent_bits, int64_t mantissa_bits, int64_t bias, c10::string_view specials,
                                  bool power_of_two) {
  RAREFY_OP(cast_minifloat_dynamic);
  return op.call(x, axis, block, exponent_bits, mantissa_bits, bias, specials, power_of_two);
}

at::Tensor mx_scale(const at::Tensor& x, c10::string_view element, int64_t block, int64_t axis) {
  RAREFY_OP(mx_scale);
  return op.call(x, element, block, axis);
}

at::Tensor fake_quantize_mx(const at::Tensor& x, c10::string_view element, int64_t block, int64_t axis) {
  RAREFY_OP(fake_quantize_mx);
  return op.call(x, element, block, axis);
}

at::Tensor nvfp4_tensor_scale(const at::Tensor& x) {
  RAREFY_OP(nvfp4_tensor_scale);
  return op.call(x);
}

at::Tensor nvfp4_scale(const at::Tensor& x, const at::Tensor& tensor_scale, int64_t block, int64_t axis) {
  RAREFY_OP(nvfp4_scale);
  return op.call(x, tensor_scale, block, axis);
}

at::Tensor fake_quantize_nvfp4(const at::Tensor& x, const std::optional<at::Tensor>& tensor_scale, int64_t block,
                               int64_t axis) {
  RAREFY_OP(fake_quantize_nvfp4);
  return op.call(x, tensor_scale, block, axis);
}

at::Tensor nf4_scale(const at::Tensor& x, int64_t block, int64_t scale_block, int64_t axis) {
  RAREFY_OP(nf4_scale);
  return op.call(x, block, scale_block, axis);
}

at::Tensor fake_quantize_nf4(const at::Tensor& x, int64_t block, int64_t scale_block, int64_t axis) {
  RAREFY_OP(fake_quantize_nf4);
  return op.call(x, block, scale_block, axis);
}

std::tuple<at::Tensor, at::Tensor> block_range(const at::Tensor& x, std::optional<int64_t> axis,
                                               c10::SymIntArrayRef block) {
  RAREFY_OP(block_range);
  return op.call(x, axis, block);
}

}  // namespace rarefy::ops
