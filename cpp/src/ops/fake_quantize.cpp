#include <ATen/core/dispatch/Dispatcher.h>
#include <rarefy/ops/fake_quantize.h>
#include <torch/library.h>

TORCH_LIBRARY_FRAGMENT(rarefy, m) {
  m.def("fake_quantize(Tensor x, Tensor scale, Tensor zero_point, int? axis, int qmin, int qmax) -> Tensor");
  m.def(
      "fake_quantize_mask(Tensor x, Tensor scale, Tensor zero_point, int? axis, int qmin, int qmax) -> (Tensor, Tensor)");
  m.def("fake_quantize_backward(Tensor grad, Tensor mask, SymInt[] strides) -> Tensor");
  m.def("fake_quantize_backward_(Tensor(a!) grad, Tensor mask) -> ()");
  m.def("quantize(Tensor x, Tensor scale, Tensor zero_point, int? axis, int qmin, int qmax) -> Tensor");
  m.def(
      "observe(Tensor x, Tensor(a!) min_val, Tensor(b!) max_val, Tensor(c!) scale, Tensor(d!) zero_point, "
      "Tensor(e!) skipped, int? axis, float? averaging_constant, int qmin, int qmax, bool symmetric) -> ()");
  m.def(
      "observe_fake_quantize(Tensor x, Tensor(a!) min_val, Tensor(b!) max_val, Tensor(c!) scale, Tensor(d!) zero_point, "
      "Tensor(e!) skipped, int? axis, float? averaging_constant, int qmin, int qmax, bool symmetric) -> Tensor");
  m.def(
      "observe_fake_quantize_mask(Tensor x, Tensor(a!) min_val, Tensor(b!) max_val, Tensor(c!) scale, "
      "Tensor(d!) zero_point, Tensor(e!) skipped, int? axis, float? averaging_constant, int qmin, int qmax, bool symmetric) "
      "-> (Tensor, Tensor)");
  m.def("choose_qparams(Tensor min_val, Tensor max_val, int qmin, int qmax, bool symmetric) -> (Tensor, Tensor)");
}

namespace rarefy::ops {
#define RAREFY_OP(name, Signature) \
  static const auto op = c10::Dispatcher::singleton().findSchemaOrThrow("rarefy::" #name, "").typed<Signature>()

at::Tensor fake_quantize(const at::Tensor& x, const at::Tensor& scale, const at::Tensor& zero_point,
                         std::optional<int64_t> axis, int64_t qmin, int64_t qmax) {
  RAREFY_OP(fake_quantize, decltype(fake_quantize));
  return op.call(x, scale, zero_point, axis, qmin, qmax);
}

std::tuple<at::Tensor, at::Tensor> fake_quantize_mask(const at::Tensor& x, const at::Tensor& scale,
                                                      const at::Tensor& zero_point, std::optional<int64_t> axis,
                                                      int64_t qmin, int64_t qmax) {
  RAREFY_OP(fake_quantize_mask, decltype(fake_quantize_mask));
  return op.call(x, scale, zero_point, axis, qmin, qmax);
}

at::Tensor fake_quantize_backward(const at::Tensor& grad, const at::Tensor& mask, c10::SymIntArrayRef strides) {
  RAREFY_OP(fake_quantize_backward, decltype(fake_quantize_backward));
  return op.call(grad, mask, strides);
}

at::Tensor quantize(const at::Tensor& x, const at::Tensor& scale, const at::Tensor& zero_point,
                    std::optional<int64_t> axis, int64_t qmin, int64_t qmax) {
  RAREFY_OP(quantize, decltype(quantize));
  return op.call(x, scale, zero_point, axis, qmin, qmax);
}

void observe(const at::Tensor& x, at::Tensor& min_val, at::Tensor& max_val, at::Tensor& scale, at::Tensor& zero_point,
             at::Tensor& skipped, std::optional<int64_t> axis, std::optional<double> averaging_constant, int64_t qmin,
             int64_t qmax, bool symmetric) {
  RAREFY_OP(observe, decltype(observe));
  op.call(x, min_val, max_val, scale, zero_point, skipped, axis, averaging_constant, qmin, qmax, symmetric);
}

at::Tensor observe_fake_quantize(const at::Tensor& x, at::Tensor& min_val, at::Tensor& max_val, at::Tensor& scale,
                                 at::Tensor& zero_point, at::Tensor& skipped, std::optional<int64_t> axis,
                                 std::optional<double> averaging_constant, int64_t qmin, int64_t qmax, bool symmetric) {
  RAREFY_OP(observe_fake_quantize, decltype(observe_fake_quantize));
  return op.call(x, min_val, max_val, scale, zero_point, skipped, axis, averaging_constant, qmin, qmax, symmetric);
}

std::tuple<at::Tensor, at::Tensor> choose_qparams(const at::Tensor& min_val, const at::Tensor& max_val, int64_t qmin,
                                                  int64_t qmax, bool symmetric) {
  RAREFY_OP(choose_qparams, decltype(choose_qparams));
  return op.call(min_val, max_val, qmin, qmax, symmetric);
}

}  // namespace rarefy::ops
