#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/mul.h>
#include <rarefy/ops/linear_distillation_loss.h>
#include <torch/library.h>

#include <algorithm>
#include <string_view>

#include "ops/linear_distillation_loss_chunks.h"

TORCH_LIBRARY_FRAGMENT(rarefy, m) {
  m.def(
      "linear_distillation_loss(Tensor student_hidden, Tensor student_weight, Tensor? student_bias, "
      "Tensor teacher_hidden, Tensor teacher_weight, Tensor? teacher_bias, Tensor? labels=None, "
      "Tensor? row_weights=None, *, float temperature, float alpha, str divergence='kl', float skew=0.5, "
      "float label_smoothing=0.0, int ignore_index=-100, str reduction='mean') -> Tensor");
  m.def(
      "linear_distillation_loss_forward(Tensor student_hidden, Tensor student_weight, Tensor? student_bias, "
      "Tensor teacher_hidden, Tensor teacher_weight, Tensor? teacher_bias, Tensor? labels=None, "
      "Tensor? row_weights=None, *, float temperature, float alpha, str divergence='kl', float skew=0.5, "
      "float label_smoothing=0.0, int ignore_index=-100, str reduction='mean', bool hidden_gradient=True, "
      "bool weight_gradient=True, bool bias_gradient=True) "
      "-> (Tensor loss, Tensor hidden, Tensor weight, Tensor bias, Tensor scale)");
  m.def("linear_distillation_loss_backward(Tensor grad, Tensor scale, Tensor upstream, ScalarType dtype) -> Tensor");
}

namespace rarefy::ops {
namespace {

using MaybeTensor = std::optional<at::Tensor>;

at::Tensor backward(const at::Tensor& grad, const at::Tensor& scale, const at::Tensor& upstream, at::ScalarType dtype) {
  const auto factor = at::mul(scale, upstream.to(scale.device(), scale.scalar_type()));
  auto out = at::empty_like(grad, grad.options().dtype(dtype));
  if (grad.scalar_type() == dtype) {
    return at::mul_out(out, grad, factor.to(dtype == at::kDouble ? at::kDouble : at::kFloat));
  }
  // Rounding to another type in pieces, each product being a temporary.
  const auto from = grad.view({-1}), to = out.view({-1});
  constexpr int64_t kPiece = int64_t{1} << 22;
  for (int64_t first = 0; first < from.size(0); first += kPiece) {
    const int64_t size = std::min(kPiece, from.size(0) - first);
    to.narrow(0, first, size).copy_(from.narrow(0, first, size).mul(factor));
  }
  return out;
}

}  // namespace

TORCH_LIBRARY_IMPL(rarefy, CompositeExplicitAutograd, m) { m.impl("linear_distillation_loss_backward", &backward); }

at::Tensor linear_distillation_loss(const LinearHead& student, const LinearHead& teacher, const MaybeTensor& labels,
                                    const MaybeTensor& row_weights, const DistillationLossSettings& settings) {
  using Signature = at::Tensor(const at::Tensor&, const at::Tensor&, const MaybeTensor&, const at::Tensor&,
                               const at::Tensor&, const MaybeTensor&, const MaybeTensor&, const MaybeTensor&, double,
                               double, std::string_view, double, double, int64_t, std::string_view);
  static const auto op =
      c10::Dispatcher::singleton().findSchemaOrThrow("rarefy::linear_distillation_loss", "").typed<Signature>();
  return op.call(student.hidden, student.weight, student.bias, teacher.hidden, teacher.weight, teacher.bias, labels,
                 row_weights, settings.temperature, settings.alpha, settings.divergence, settings.skew,
                 settings.label_smoothing, settings.ignore_index, settings.reduction);
}

LinearDistillationGradients linear_distillation_loss_forward(const LinearHead& student, const LinearHead& teacher,
                                                             const MaybeTensor& labels, const MaybeTensor& row_weights,
                                                             const DistillationLossSettings& settings,
                                                             bool hidden_gradient, bool weight_gradient,
                                                             bool bias_gradient) {
  using Signature =
      LinearDistillationResult(const at::Tensor&, const at::Tensor&, const MaybeTensor&, const at::Tensor&,
                               const at::Tensor&, const MaybeTensor&, const MaybeTensor&, const MaybeTensor&, double,
                               double, std::string_view, double, double, int64_t, std::string_view, bool, bool, bool);
  static const auto op =
      c10::Dispatcher::singleton().findSchemaOrThrow("rarefy::linear_distillation_loss_forward", "").typed<Signature>();
  auto [loss, hidden, weight, bias, scale] = op.call(
      student.hidden, student.weight, student.bias, teacher.hidden, teacher.weight, teacher.bias, labels, row_weights,
      settings.temperature, settings.alpha, settings.divergence, settings.skew, settings.label_smoothing,
      settings.ignore_index, settings.reduction, hidden_gradient, weight_gradient, bias_gradient);
  return {loss, hidden, weight, bias, scale};
}

at::Tensor linear_distillation_loss_backward(const at::Tensor& grad, const at::Tensor& scale,
                                             const at::Tensor& upstream, at::ScalarType dtype) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("rarefy::linear_distillation_loss_backward", "")
                             .typed<decltype(linear_distillation_loss_backward)>();
  return op.call(grad, scale, upstream, dtype);
}

}  // namespace rarefy::ops
