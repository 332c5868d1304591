#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <rarefy/ops/distillation_loss.h>
#include <torch/library.h>

#include "ops/distillation_loss_checks.h"

namespace rarefy::ops {
namespace {

at::Tensor distillation_loss_meta(const at::Tensor& student_logits, const at::Tensor& teacher_logits,
                                  const std::optional<at::Tensor>& labels, double temperature, double alpha, int64_t) {
  check_distillation_loss(student_logits, teacher_logits, labels, temperature, alpha);
  return at::empty({}, student_logits.options().dtype(loss_type(student_logits)));
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> distillation_loss_forward_meta(const at::Tensor& student_logits,
                                                                              const at::Tensor& teacher_logits,
                                                                              const std::optional<at::Tensor>& labels,
                                                                              double temperature, double alpha,
                                                                              int64_t ignore_index) {
  auto loss = distillation_loss_meta(student_logits, teacher_logits, labels, temperature, alpha, ignore_index);
  return {loss, at::empty_like(student_logits, at::MemoryFormat::Contiguous), at::empty_like(loss)};
}

at::Tensor distillation_loss_backward_meta(const at::Tensor& grad, const at::Tensor&, const at::Tensor&) {
  return at::empty_like(grad, at::MemoryFormat::Contiguous);
}

}  // namespace

TORCH_LIBRARY_IMPL(rarefy, Meta, m) {
  m.impl("distillation_loss", &distillation_loss_meta);
  m.impl("distillation_loss_forward", &distillation_loss_forward_meta);
  m.impl("distillation_loss_backward", &distillation_loss_backward_meta);
}

}  // namespace rarefy::ops
