#include <ATen/TensorSubclassLikeUtils.h>
#include <ATen/autocast_mode.h>
#include <rarefy/ops/linear_distillation_loss.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/csrc/autograd/functions/basic_ops.h>
#include <torch/library.h>

#include "ops/autograd/constants.h"
#include "ops/linear_distillation_loss_chunks.h"

namespace rarefy::ops {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::Variable;
using torch::autograd::variable_list;

/// True when scale * upstream is known to be 1 without waiting for a device or breaking a trace.
bool is_plain_one(const at::Tensor& scale, const at::Tensor& upstream) {
  return upstream.is_cpu() && scale.is_cpu() && !at::isTensorSubclassLike(upstream) &&
         !at::isTensorSubclassLike(scale) && scale.item().toDouble() * upstream.item().toDouble() == 1.0;
}

class LinearDistillationLoss : public torch::autograd::Function<LinearDistillationLoss> {
 public:
  static Variable forward(AutogradContext* ctx, const Variable& hidden, const Variable& weight,
                          const std::optional<at::Tensor>& bias, const LinearDistillationArguments& arguments) {
    at::AutoDispatchBelowADInplaceOrView guard;
    const auto results = linear_distillation_loss_forward(
        arguments.student, arguments.teacher, arguments.labels, arguments.row_weights, arguments.settings,
        hidden.requires_grad(), weight.requires_grad(), bias.has_value() && bias->requires_grad());
    ctx->save_for_backward({results.hidden, results.weight, results.bias, results.scale});
    ctx->saved_data["inputs"] = bias.has_value() ? 3 : 2;
    ctx->saved_data["dtype"] = static_cast<int64_t>(hidden.scalar_type());
    return results.loss;
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& upstream) {
    const auto saved = ctx->get_saved_variables();
    const auto dtype = static_cast<at::ScalarType>(ctx->saved_data["dtype"].toInt());
    variable_list grads(4);
    for (size_t i = 0; i < static_cast<size_t>(ctx->saved_data["inputs"].toInt()); ++i) {
      if (!ctx->needs_input_grad(i)) {
        continue;
      }
      at::AutoGradMode no_grad(false);
      grads[i] = saved[i].scalar_type() == dtype && is_plain_one(saved[3], upstream[0])
                     ? saved[i]
                     : linear_distillation_loss_backward(saved[i], saved[3], upstream[0], dtype);
    }
    if (at::GradMode::is_enabled()) {  // create_graph: an error when the gradient is differentiated, not a constant
      const auto error = std::make_shared<torch::autograd::DelayedError>(
          "[linear_distillation_loss] is differentiable once: its gradients are formed in the forward pass, so a second "
          "derivative needs the loss written with torch's own operators",
          1);
      for (auto& grad : grads) {
        if (grad.defined()) {
          grad = (*error)({grad.detach().requires_grad_(true)})[0];
        }
      }
    }
    return grads;
  }
};

at::Tensor call(const LinearDistillationArguments& arguments) {
  return linear_distillation_loss(arguments.student, arguments.teacher, arguments.labels, arguments.row_weights,
                                  arguments.settings);
}

at::Tensor autograd(const LinearDistillationArguments& arguments) {
  const auto& [hidden, weight, bias] = arguments.student;
  const auto& teacher = arguments.teacher;
  check_no_tangent("linear_distillation_loss",
                   {hidden, weight, bias, teacher.hidden, teacher.weight, teacher.bias, arguments.row_weights});
  check_constant_weights("linear_distillation_loss", arguments.row_weights);
  const bool needed = hidden.requires_grad() || weight.requires_grad() || (bias.has_value() && bias->requires_grad());
  if (!needed || !at::GradMode::is_enabled()) {
    at::AutoDispatchBelowADInplaceOrView guard;
    return call(arguments);
  }
  return LinearDistillationLoss::apply(hidden, weight, bias, arguments);
}

/// As a linear layer under autocast: float32 becomes autocast's dtype.
template <c10::DeviceType device>
at::Tensor autocast(const LinearDistillationArguments& given) {
  c10::impl::ExcludeDispatchKeyGuard guard(at::autocast::get_autocast_dispatch_key_from_device_type(device));
  const auto dtype = at::autocast::get_autocast_dtype(device);
  const auto cast = [dtype](const LinearHead& head) -> LinearHead {
    return {at::autocast::cached_cast(dtype, head.hidden, device),
            at::autocast::cached_cast(dtype, head.weight, device), at::autocast::cached_cast(dtype, head.bias, device)};
  };
  auto arguments = given;
  arguments.student = cast(given.student);
  arguments.teacher = cast(given.teacher);
  return call(arguments);
}

}  // namespace

TORCH_LIBRARY_IMPL(rarefy, Autograd, m) { m.impl("linear_distillation_loss", &with_linear_settings<&autograd>); }
TORCH_LIBRARY_IMPL(rarefy, AutocastCPU, m) {
  m.impl("linear_distillation_loss", &with_linear_settings<&autocast<at::kCPU>>);
}
TORCH_LIBRARY_IMPL(rarefy, AutocastCUDA, m) {
  m.impl("linear_distillation_loss", &with_linear_settings<&autocast<at::kCUDA>>);
}

}  // namespace rarefy::ops
