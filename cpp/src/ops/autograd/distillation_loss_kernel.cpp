#include <ATen/TensorSubclassLikeUtils.h>
#include <ATen/autocast_mode.h>
#include <rarefy/ops/distillation_loss.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/csrc/autograd/functions/basic_ops.h>
#include <torch/library.h>

#include <algorithm>

#include "ops/autograd/constants.h"
#include "ops/distillation_rule.h"

namespace rarefy::ops {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::Variable;
using torch::autograd::variable_list;

/// True when scale * upstream is known to be 1 without waiting for a device or breaking a trace.
bool is_plain_one(const at::Tensor& scale, const at::Tensor& upstream) {
  if (!upstream.is_cpu() || !scale.is_cpu() || at::isTensorSubclassLike(upstream) || at::isTensorSubclassLike(scale)) {
    return false;
  }
  // One number for every row: what the sum of row losses has as its gradient.
  const auto strides = upstream.strides();
  const bool uniform = std::all_of(strides.begin(), strides.end(), [](int64_t stride) { return stride == 0; });
  return uniform && upstream.numel() > 0 &&
         scale.item().toDouble() * upstream.as_strided({}, {}).item().toDouble() == 1.0;
}

class DistillationLoss : public torch::autograd::Function<DistillationLoss> {
 public:
  static Variable forward(AutogradContext* ctx, const Variable& student, const Variable& teacher,
                          const std::optional<at::Tensor>& labels, const std::optional<at::Tensor>& row_weights,
                          const DistillationLossSettings& settings) {
    at::AutoDispatchBelowADInplaceOrView guard;
    auto [loss, grad, scale] = distillation_loss_forward(student, teacher, labels, row_weights, settings);
    ctx->save_for_backward({grad, scale});
    return loss;
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& upstream) {
    const auto saved = ctx->get_saved_variables();
    at::Tensor grad;
    {
      at::AutoGradMode no_grad(false);
      grad =
          is_plain_one(saved[1], upstream[0]) ? saved[0] : distillation_loss_backward(saved[0], saved[1], upstream[0]);
    }
    if (at::GradMode::
            is_enabled()) {  // create_graph: say so when the gradient is differentiated, not a silent constant
      const auto error = std::make_shared<torch::autograd::DelayedError>(
          "[distillation_loss] is differentiable once: its gradient is formed in the forward pass, so a second derivative "
          "(a gradient penalty, a Hessian) needs the loss written with torch's own operators",
          1);
      grad = (*error)({grad.detach().requires_grad_(true)})[0];
    }
    return {grad, {}, {}, {}, {}};
  }
};

at::Tensor distillation_loss_autograd(const at::Tensor& student, const at::Tensor& teacher,
                                      const std::optional<at::Tensor>& labels,
                                      const std::optional<at::Tensor>& row_weights,
                                      const DistillationLossSettings& settings) {
  check_no_tangent("distillation_loss", {student, teacher, row_weights});
  check_constant_weights("distillation_loss", row_weights);
  if (!student.requires_grad() || !at::GradMode::is_enabled()) {  // no gradient is needed
    at::AutoDispatchBelowADInplaceOrView guard;
    return distillation_loss(student, teacher, labels, row_weights, settings);
  }
  return DistillationLoss::apply(student, teacher, labels, row_weights, settings);
}

/// Under autocast one model may give 16-bit logits and the other float32: then both are taken in float32. Equal dtypes
/// stay: the computation is in float32 anyway.
template <c10::DeviceType device>
at::Tensor distillation_loss_autocast(const at::Tensor& student, const at::Tensor& teacher,
                                      const std::optional<at::Tensor>& labels,
                                      const std::optional<at::Tensor>& row_weights,
                                      const DistillationLossSettings& settings) {
  c10::impl::ExcludeDispatchKeyGuard guard(at::autocast::get_autocast_dispatch_key_from_device_type(device));
  if (student.scalar_type() == teacher.scalar_type()) {
    return distillation_loss(student, teacher, labels, row_weights, settings);
  }
  return distillation_loss(at::autocast::cached_cast(at::kFloat, student, device),
                           at::autocast::cached_cast(at::kFloat, teacher, device), labels, row_weights, settings);
}

}  // namespace

TORCH_LIBRARY_IMPL(rarefy, Autograd, m) { m.impl("distillation_loss", &with_settings<&distillation_loss_autograd>); }
TORCH_LIBRARY_IMPL(rarefy, AutocastCPU, m) {
  m.impl("distillation_loss", &with_settings<&distillation_loss_autocast<at::kCPU>>);
}
TORCH_LIBRARY_IMPL(rarefy, AutocastCUDA, m) {
  m.impl("distillation_loss", &with_settings<&distillation_loss_autocast<at::kCUDA>>);
}

}  // namespace rarefy::ops
