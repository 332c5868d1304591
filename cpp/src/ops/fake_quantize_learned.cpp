#include <ATen/core/dispatch/Dispatcher.h>
#include <rarefy/ops/fake_quantize_learned.h>
#include <torch/library.h>

TORCH_LIBRARY_FRAGMENT(rarefy, m) {
  m.def(
      "fake_quantize_learned(Tensor x, Tensor scale, Tensor zero_point, int? axis, int qmin, int qmax, "
      "float gradient_scale) -> Tensor");
  m.def(
      "fake_quantize_learned_backward(Tensor grad, Tensor x, Tensor scale, Tensor zero_point, int? axis, int qmin, "
      "int qmax, float gradient_scale) -> (Tensor, Tensor)");
  m.def(
      "fake_quantize_learned_backward_(Tensor(a!) grad, Tensor x, Tensor scale, Tensor zero_point, int? axis, int qmin, "
      "int qmax, float gradient_scale) -> Tensor");
}

namespace rarefy::ops {

at::Tensor fake_quantize_learned(const at::Tensor& x, const at::Tensor& scale, const at::Tensor& zero_point,
                                 std::optional<int64_t> axis, int64_t qmin, int64_t qmax, double gradient_scale) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("rarefy::fake_quantize_learned", "")
                             .typed<decltype(fake_quantize_learned)>();
  return op.call(x, scale, zero_point, axis, qmin, qmax, gradient_scale);
}

std::tuple<at::Tensor, at::Tensor> fake_quantize_learned_backward(const at::Tensor& grad, const at::Tensor& x,
                                                                  const at::Tensor& scale, const at::Tensor& zero_point,
                                                                  std::optional<int64_t> axis, int64_t qmin,
                                                                  int64_t qmax, double gradient_scale) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("rarefy::fake_quantize_learned_backward", "")
                             .typed<decltype(fake_quantize_learned_backward)>();
  return op.call(grad, x, scale, zero_point, axis, qmin, qmax, gradient_scale);
}

}  // namespace rarefy::ops
