#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/ones.h>
#include <rarefy/ops/compact_logits.h>
#include <rarefy/ops/top_k_distillation_loss.h>
#include <torch/library.h>

#include <string>
#include <string_view>
#include <utility>

#include "ops/distillation_rule.h"
#include "ops/readable.h"

TORCH_LIBRARY_FRAGMENT(rarefy, m) {
  m.def(
      "top_k_distillation_loss(Tensor student_logits, Tensor values, Tensor indices, Tensor tail, Tensor? labels=None, "
      "Tensor? row_weights=None, *, float temperature, float alpha, str divergence='kl', float skew=0.5, "
      "float label_smoothing=0.0, int ignore_index=-100, str reduction='mean') -> Tensor");
}

namespace rarefy::ops {
namespace {

using MaybeTensor = std::optional<at::Tensor>;

/// The rules of distillation_loss, which sees no classes where alpha is 1.
void check_labels(const at::Tensor& student, const at::Tensor& labels, const MaybeTensor& row_weights,
                  int64_t ignore_index) {
  TORCH_CHECK_TYPE(labels.scalar_type() == at::kLong, "[top_k_distillation_loss] labels must be int64, got ",
                   labels.scalar_type());
  TORCH_CHECK_VALUE(student.dim() >= 1,
                    "[top_k_distillation_loss] student_logits must have shape [..., classes], got a scalar");
  const auto rows = student.sym_sizes().slice(0, static_cast<size_t>(student.dim()) - 1);
  for (const auto& [name, x] :
       {std::pair("labels", &labels), std::pair("row_weights", row_weights ? &*row_weights : nullptr)}) {
    TORCH_CHECK_VALUE(x == nullptr || x->sym_sizes() == rows, "[top_k_distillation_loss] ", name,
                      " must have the logits' shape without classes, ", rows, ", got ", x->sym_sizes());
  }
  if (!is_readable(labels) || (row_weights.has_value() && !is_readable(*row_weights))) {
    return;
  }
  const auto classes = student.size(-1);
  auto wrong = (labels != ignore_index).logical_and((labels < 0).logical_or(labels >= classes));
  if (row_weights.has_value()) {
    wrong = wrong.logical_and(*row_weights != 0.0);
  }
  const auto at = wrong.flatten().nonzero();
  if (at.numel() > 0) {
    const auto row = at[0][0].item<int64_t>();
    TORCH_CHECK_INDEX(false, "[top_k_distillation_loss] labels must be in [0, ", classes, ") or ignore_index (",
                      ignore_index, "), got ", labels.flatten()[row].item<int64_t>(), " at row ", row);
  }
}

at::Tensor composite(const at::Tensor& student, const at::Tensor& values, const at::Tensor& indices,
                     const at::Tensor& tail, const MaybeTensor& labels, const MaybeTensor& row_weights,
                     double temperature, double alpha, std::string_view divergence, double skew, double label_smoothing,
                     int64_t ignore_index, std::string_view reduction) {
  DistillationLossSettings settings{temperature,     alpha,        std::string(divergence), skew,
                                    label_smoothing, ignore_index, std::string(reduction)};
  const auto rule = resolve("top_k_distillation_loss", settings);
  TORCH_CHECK_VALUE(values.dim() >= 1 && values.sym_sizes() == indices.sym_sizes(),
                    "[top_k_distillation_loss] values must have the shape [..., k] of indices, ", indices.sym_sizes(),
                    ", got ", values.sym_sizes());
  TORCH_CHECK_VALUE(tail.sym_sizes() == values.sym_sizes().slice(0, static_cast<size_t>(values.dim()) - 1),
                    "[top_k_distillation_loss] tail must have the shape of values without k, ", values.sym_sizes(),
                    ", got ", tail.sym_sizes());
  TORCH_CHECK_TYPE(values.is_floating_point() && tail.is_floating_point(),
                   "[top_k_distillation_loss] values and tail must be floating point, got ", values.scalar_type(),
                   " and ", tail.scalar_type());
  TORCH_CHECK_VALUE(labels.has_value() || !rule.hard(),
                    "[top_k_distillation_loss] labels must be given when alpha is below 1, got none with alpha ",
                    alpha);
  if (labels.has_value()) {
    check_labels(student, *labels, row_weights, ignore_index);
  }
  at::Tensor loss;
  if (rule.soft()) {
    auto outcomes = compact_logits(student, indices, temperature);
    auto teacher = values.to(outcomes.scalar_type());
    if (indices.sym_size(-1) == student.sym_size(-1)) {  // there are no others
      outcomes = outcomes.narrow_symint(-1, 0, indices.sym_size(-1));
    } else {
      teacher = at::cat({teacher, tail.to(outcomes.scalar_type()).unsqueeze(-1)}, -1);
    }
    // A label is a class and not an outcome: here it only says which rows count.
    auto weights = row_weights;
    if (labels.has_value()) {
      weights = (weights.has_value() ? *weights : at::ones_symint(labels->sym_sizes(), outcomes.options()))
                    .masked_fill(*labels == ignore_index, 0.0);
    }
    auto soft = settings;
    soft.alpha = 1.0;
    soft.label_smoothing = 0.0;
    loss = distillation_loss(outcomes, teacher, std::nullopt, weights, soft) * alpha;
  }
  if (rule.hard()) {
    auto hard = settings;
    hard.alpha = 0.0;
    const auto entropy = distillation_loss(student, student.detach(), labels, row_weights, hard);
    loss = loss.defined() ? loss + entropy * (1.0 - alpha) : entropy;
  }
  return loss;
}

}  // namespace

TORCH_LIBRARY_IMPL(rarefy, CompositeImplicitAutograd, m) { m.impl("top_k_distillation_loss", &composite); }

at::Tensor top_k_distillation_loss(const at::Tensor& student_logits, const at::Tensor& values,
                                   const at::Tensor& indices, const at::Tensor& tail, const MaybeTensor& labels,
                                   const MaybeTensor& row_weights, const DistillationLossSettings& settings) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("rarefy::top_k_distillation_loss", "")
                             .typed<decltype(composite)>();
  return op.call(student_logits, values, indices, tail, labels, row_weights, settings.temperature, settings.alpha,
                 settings.divergence, settings.skew, settings.label_smoothing, settings.ignore_index,
                 settings.reduction);
}

}  // namespace rarefy::ops
