#include <ATen/core/dispatch/Dispatcher.h>
#include <rarefy/ops/distillation_loss.h>
#include <torch/library.h>

#include <string_view>

TORCH_LIBRARY_FRAGMENT(rarefy, m) {
  m.def(
      "distillation_loss(Tensor student_logits, Tensor teacher_logits, Tensor? labels=None, Tensor? row_weights=None, *, "
      "float temperature, float alpha, str divergence='kl', float skew=0.5, float label_smoothing=0.0, "
      "int ignore_index=-100, str reduction='mean') -> Tensor");
  m.def(
      "distillation_loss_forward(Tensor student_logits, Tensor teacher_logits, Tensor? labels=None, "
      "Tensor? row_weights=None, *, float temperature, float alpha, str divergence='kl', float skew=0.5, "
      "float label_smoothing=0.0, int ignore_index=-100, str reduction='mean') "
      "-> (Tensor loss, Tensor grad, Tensor scale)");
  m.def("distillation_loss_backward(Tensor grad, Tensor scale, Tensor upstream) -> Tensor");
}

namespace rarefy::ops {
namespace {

template <typename Result>
using Operator = Result(const at::Tensor&, const at::Tensor&, const std::optional<at::Tensor>&,
                        const std::optional<at::Tensor>&, double, double, std::string_view, double, double, int64_t,
                        std::string_view);
using Forward = std::tuple<at::Tensor, at::Tensor, at::Tensor>;

}  // namespace

at::Tensor distillation_loss(const at::Tensor& student_logits, const at::Tensor& teacher_logits,
                             const std::optional<at::Tensor>& labels, const std::optional<at::Tensor>& row_weights,
                             const DistillationLossSettings& settings) {
  static const auto op =
      c10::Dispatcher::singleton().findSchemaOrThrow("rarefy::distillation_loss", "").typed<Operator<at::Tensor>>();
  return op.call(student_logits, teacher_logits, labels, row_weights, settings.temperature, settings.alpha,
                 settings.divergence, settings.skew, settings.label_smoothing, settings.ignore_index,
                 settings.reduction);
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> distillation_loss_forward(const at::Tensor& student_logits,
                                                                         const at::Tensor& teacher_logits,
                                                                         const std::optional<at::Tensor>& labels,
                                                                         const std::optional<at::Tensor>& row_weights,
                                                                         const DistillationLossSettings& settings) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("rarefy::distillation_loss_forward", "")
                             .typed<Operator<Forward>>();
  return op.call(student_logits, teacher_logits, labels, row_weights, settings.temperature, settings.alpha,
                 settings.divergence, settings.skew, settings.label_smoothing, settings.ignore_index,
                 settings.reduction);
}

at::Tensor distillation_loss_backward(const at::Tensor& grad, const at::Tensor& scale, const at::Tensor& upstream) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("rarefy::distillation_loss_backward", "")
                             .typed<decltype(distillation_loss_backward)>();
  return op.call(grad, scale, upstream);
}

}  // namespace rarefy::ops
