#include "ops/cuda/distillation_loss_kernel.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <c10/core/DeviceGuard.h>
#include <rarefy/ops/distillation_loss.h>
#include <torch/library.h>

#include "ops/cuda/launch.h"
#include "ops/distillation_rule.h"

namespace rarefy::ops {
namespace {

struct Results {
  at::Tensor loss;
  at::Tensor grad;   // undefined unless it was asked for
  at::Tensor scale;  // the same
};

Results run(const at::Tensor& student_logits, const at::Tensor& teacher_logits, const std::optional<at::Tensor>& labels,
            const std::optional<at::Tensor>& row_weights, const DistillationLossSettings& settings,
            bool with_gradient) {
  const auto rule = resolve("distillation_loss", settings);
  check_distillation_loss(student_logits, teacher_logits, labels, row_weights, rule);
  const c10::DeviceGuard guard(student_logits.device());
  const auto student = student_logits.contiguous();
  const auto teacher = teacher_logits.contiguous();
  const auto targets = labels.has_value() ? labels->contiguous() : at::Tensor();
  const auto weights = row_weights.has_value() ? row_weights->to(at::kDouble).contiguous() : at::Tensor();
  const int64_t classes = student.size(-1), rows = student.numel() / classes;
  const bool none = rule.reduction == Reduction::none;
  Results results;
  results.loss = at::empty({}, student.options().dtype(loss_type(student)));
  if (with_gradient) {
    results.grad = at::empty_like(student);
    results.scale = at::empty_like(results.loss);
  }
  const auto row_losses = at::empty({rows}, student.options().dtype(at::kDouble));
  const auto total_weight = at::empty({2}, row_losses.options());
  check_launch("distillation_loss",
               cuda::distillation_loss({float_type(student),
                                        rows,
                                        classes,
                                        rule.temperature,
                                        rule.alpha,
                                        rule.divergence,
                                        rule.skew,
                                        rule.label_smoothing,
                                        rule.ignore_index,
                                        rule.reduction,
                                        rule.reduction == Reduction::mean && student.scalar_type() == at::kHalf,
                                        student.const_data_ptr(),
                                        teacher.const_data_ptr(),
                                        targets.defined() ? targets.const_data_ptr<int64_t>() : nullptr,
                                        weights.defined() ? weights.const_data_ptr<double>() : nullptr,
                                        with_gradient ? results.grad.data_ptr() : nullptr,
                                        row_losses.data_ptr<double>(),
                                        total_weight.data_ptr<double>(),
                                        none ? nullptr : results.loss.data_ptr(),
                                        with_gradient ? results.scale.data_ptr() : nullptr},
                                       stream_of(student)));
  if (none) {
    const auto shape = student.sizes().slice(0, static_cast<size_t>(student.dim()) - 1);
    results.loss = row_losses.view(shape).to(results.loss.scalar_type());
  }
  return results;
}

at::Tensor distillation_loss_cuda(const at::Tensor& student_logits, const at::Tensor& teacher_logits,
                                  const std::optional<at::Tensor>& labels, const std::optional<at::Tensor>& row_weights,
                                  const DistillationLossSettings& settings) {
  return run(student_logits, teacher_logits, labels, row_weights, settings, false).loss;
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> distillation_loss_forward_cuda(
    const at::Tensor& student_logits, const at::Tensor& teacher_logits, const std::optional<at::Tensor>& labels,
    const std::optional<at::Tensor>& row_weights, const DistillationLossSettings& settings) {
  auto results = run(student_logits, teacher_logits, labels, row_weights, settings, true);
  return {results.loss, results.grad, results.scale};
}

at::Tensor distillation_loss_backward_cuda(const at::Tensor& grad, const at::Tensor& scale,
                                           const at::Tensor& upstream) {
  const c10::DeviceGuard guard(grad.device());
  const auto in = grad.contiguous();
  const auto rows = in.sizes().slice(0, static_cast<size_t>(in.dim()) - 1);
  TORCH_CHECK_VALUE(upstream.dim() == 0 || upstream.sizes() == rows,
                    "[distillation_loss_backward] upstream must be a scalar or have shape ", rows, ", got ",
                    upstream.sizes());
  const auto factor = upstream.to(in.device(), scale.scalar_type()).contiguous();
  auto out = at::empty_like(in);
  check_launch(
      "distillation_loss_backward",
      cuda::scale_gradient(float_type(in), in.const_data_ptr(), scale.const_data_ptr(), factor.const_data_ptr(),
                           upstream.dim() == 0 ? in.numel() : in.size(-1), out.data_ptr(), in.numel(), stream_of(in)));
  return out;
}

}  // namespace

TORCH_LIBRARY_IMPL(rarefy, CUDA, m) {
  m.impl("distillation_loss", &with_settings<&distillation_loss_cuda>);
  m.impl("distillation_loss_forward", &with_settings<&distillation_loss_forward_cuda>);
  m.impl("distillation_loss_backward", &distillation_loss_backward_cuda);
}

}  // namespace rarefy::ops
