#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <rarefy/ops/distillation_loss.h>
#include <torch/library.h>

#include "ops/distillation_rule.h"

namespace rarefy::ops {
namespace {

at::Tensor distillation_loss_meta(const at::Tensor& student_logits, const at::Tensor& teacher_logits,
                                  const std::optional<at::Tensor>& labels, const std::optional<at::Tensor>& row_weights,
                                  const DistillationLossSettings& settings) {
  const auto rule = resolve("distillation_loss", settings);
  check_distillation_loss(student_logits, teacher_logits, labels, row_weights, rule);
  const auto rows = student_logits.sym_sizes().slice(0, static_cast<size_t>(student_logits.dim()) - 1);
  return at::empty_symint(rule.reduction == Reduction::none ? rows : c10::SymIntArrayRef(),
                          student_logits.options().dtype(loss_type(student_logits)));
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> distillation_loss_forward_meta(
    const at::Tensor& student_logits, const at::Tensor& teacher_logits, const std::optional<at::Tensor>& labels,
    const std::optional<at::Tensor>& row_weights, const DistillationLossSettings& settings) {
  auto loss = distillation_loss_meta(student_logits, teacher_logits, labels, row_weights, settings);
  return {loss, at::empty_like(student_logits, at::MemoryFormat::Contiguous), at::empty({}, loss.options())};
}

at::Tensor distillation_loss_backward_meta(const at::Tensor& grad, const at::Tensor&, const at::Tensor&) {
  return at::empty_like(grad, at::MemoryFormat::Contiguous);
}

}  // namespace

TORCH_LIBRARY_IMPL(rarefy, Meta, m) {
  m.impl("distillation_loss", &with_settings<&distillation_loss_meta>);
  m.impl("distillation_loss_forward", &with_settings<&distillation_loss_forward_meta>);
  m.impl("distillation_loss_backward", &distillation_loss_backward_meta);
}

}  // namespace rarefy::ops
