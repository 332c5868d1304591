#include <rarefy/ops/compact_logits.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/csrc/autograd/functions/basic_ops.h>
#include <torch/library.h>

#include "ops/autograd/constants.h"

namespace rarefy::ops {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::Variable;
using torch::autograd::variable_list;

class CompactLogits : public torch::autograd::Function<CompactLogits> {
 public:
  static Variable forward(AutogradContext* ctx, const Variable& logits, const Variable& indices, double temperature) {
    at::AutoDispatchBelowADInplaceOrView guard;
    auto compact = compact_logits(logits, indices, temperature);
    ctx->save_for_backward({logits, indices, compact});
    ctx->saved_data["temperature"] = temperature;
    return compact;
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& upstream) {
    const auto saved = ctx->get_saved_variables();
    at::Tensor grad;
    {
      at::AutoGradMode no_grad(false);
      grad =
          compact_logits_backward(upstream[0], saved[0], saved[1], saved[2], ctx->saved_data["temperature"].toDouble());
    }
    if (at::GradMode::is_enabled()) {
      const auto error = std::make_shared<torch::autograd::DelayedError>(
          "[compact_logits] is differentiable once: a second derivative needs it written with torch's own operators",
          1);
      grad = (*error)({grad.detach().requires_grad_(true)})[0];
    }
    return {grad, {}, {}};
  }
};

at::Tensor compact_logits_autograd(const at::Tensor& logits, const at::Tensor& indices, double temperature) {
  check_no_tangent("compact_logits", {logits});
  if (!logits.requires_grad() || !at::GradMode::is_enabled()) {  // no gradient is needed
    at::AutoDispatchBelowADInplaceOrView guard;
    return compact_logits(logits, indices, temperature);
  }
  return CompactLogits::apply(logits, indices, temperature);
}

}  // namespace

TORCH_LIBRARY_IMPL(rarefy, Autograd, m) { m.impl("compact_logits", &compact_logits_autograd); }

}  // namespace rarefy::ops
