#include <rarefy/ops/fake_quantize_range.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include "ops/autograd/not_differentiable.h"

namespace rarefy::ops {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::Variable;
using torch::autograd::variable_list;

class FakeQuantizeRange : public torch::autograd::Function<FakeQuantizeRange> {
 public:
  static Variable forward(AutogradContext* ctx, const Variable& x, const Variable& scale, const Variable& low,
                          const Variable& high, std::optional<int64_t> axis, double gradient_scale) {
    at::AutoDispatchBelowADInplaceOrView guard;
    ctx->save_for_backward({x, scale, low, high});
    ctx->saved_data["axis"] = axis;
    ctx->saved_data["gradient_scale"] = gradient_scale;
    return fake_quantize_range(x, scale, low, high, axis, gradient_scale);
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    TORCH_CHECK_NOT_IMPLEMENTED(!at::GradMode::is_enabled(),
                                "[fake_quantize_range] there is no second derivative, got create_graph=True");
    const auto saved = ctx->get_saved_variables();
    auto [dx, dscale, dlow, dhigh] = fake_quantize_range_backward(grads[0], saved[0], saved[1], saved[2], saved[3],
                                                                  ctx->saved_data["axis"].toOptional<int64_t>(),
                                                                  ctx->saved_data["gradient_scale"].toDouble());
    // The engine drops what nobody asked for.
    return {dx, dscale, dlow, dhigh, {}, {}};
  }
};

at::Tensor range_autograd(const at::Tensor& x, const at::Tensor& scale, const at::Tensor& low, const at::Tensor& high,
                          std::optional<int64_t> axis, double gradient_scale) {
  const bool any = x.requires_grad() || scale.requires_grad() || low.requires_grad() || high.requires_grad();
  if (!at::GradMode::is_enabled() || !any) {
    at::AutoDispatchBelowADInplaceOrView guard;
    return fake_quantize_range(x, scale, low, high, axis, gradient_scale);
  }
  return FakeQuantizeRange::apply(x, scale, low, high, axis, gradient_scale);
}

}  // namespace

TORCH_LIBRARY_IMPL(rarefy, Autograd, m) {
  m.impl("fake_quantize_range", &range_autograd);
  m.impl("fake_quantize_range_backward", &NotDifferentiable<&fake_quantize_range_backward>::call);
}

}  // namespace rarefy::ops
