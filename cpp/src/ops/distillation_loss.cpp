#include <ATen/core/dispatch/Dispatcher.h>
#include <rarefy/ops/distillation_loss.h>
#include <torch/library.h>

TORCH_LIBRARY_FRAGMENT(rarefy, m) {
  m.def(
      "distillation_loss(Tensor student_logits, Tensor teacher_logits, Tensor? labels, float temperature, float alpha, "
      "int ignore_index) -> Tensor");
  m.def(
      "distillation_loss_forward(Tensor student_logits, Tensor teacher_logits, Tensor? labels, float temperature, "
      "float alpha, int ignore_index) -> (Tensor loss, Tensor grad, Tensor scale)");
  m.def("distillation_loss_backward(Tensor grad, Tensor scale, Tensor upstream) -> Tensor");
}

namespace rarefy::ops {

at::Tensor distillation_loss(const at::Tensor& student_logits, const at::Tensor& teacher_logits,
                             const std::optional<at::Tensor>& labels, double temperature, double alpha,
                             int64_t ignore_index) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("rarefy::distillation_loss", "")
                             .typed<decltype(distillation_loss)>();
  return op.call(student_logits, teacher_logits, labels, temperature, alpha, ignore_index);
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> distillation_loss_forward(const at::Tensor& student_logits,
                                                                         const at::Tensor& teacher_logits,
                                                                         const std::optional<at::Tensor>& labels,
                                                                         double temperature, double alpha,
                                                                         int64_t ignore_index) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("rarefy::distillation_loss_forward", "")
                             .typed<decltype(distillation_loss_forward)>();
  return op.call(student_logits, teacher_logits, labels, temperature, alpha, ignore_index);
}

at::Tensor distillation_loss_backward(const at::Tensor& grad, const at::Tensor& scale, const at::Tensor& upstream) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("rarefy::distillation_loss_backward", "")
                             .typed<decltype(distillation_loss_backward)>();
  return op.call(grad, scale, upstream);
}

}  // namespace rarefy::ops
