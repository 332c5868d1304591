#include <ATen/core/dispatch/Dispatcher.h>
#include <rarefy/ops/fake_quantize_learned.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include "ops/autograd/mask_gradient.h"

namespace rarefy::ops {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::Variable;
using torch::autograd::variable_list;

at::Tensor learned_backward_inplace(at::Tensor& grad, const at::Tensor& x, const at::Tensor& scale,
                                    const at::Tensor& zero_point, std::optional<int64_t> axis, int64_t qmin,
                                    int64_t qmax, double gradient_scale) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("rarefy::fake_quantize_learned_backward_", "")
                             .typed<decltype(learned_backward_inplace)>();
  return op.call(grad, x, scale, zero_point, axis, qmin, qmax, gradient_scale);
}

class FakeQuantizeLearned : public torch::autograd::Function<FakeQuantizeLearned> {
 public:
  static Variable forward(AutogradContext* ctx, const Variable& x, const Variable& scale, const Variable& zero_point,
                          std::optional<int64_t> axis, int64_t qmin, int64_t qmax, double gradient_scale) {
    at::AutoDispatchBelowADInplaceOrView guard;
    ctx->save_for_backward({x, scale, zero_point});
    ctx->saved_data["axis"] = axis;
    ctx->saved_data["qmin"] = qmin;
    ctx->saved_data["qmax"] = qmax;
    ctx->saved_data["gradient_scale"] = gradient_scale;
    return fake_quantize_learned(x, scale, zero_point, axis, qmin, qmax, gradient_scale);
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    TORCH_CHECK_NOT_IMPLEMENTED(!at::GradMode::is_enabled(),
                                "[fake_quantize_learned] there is no second derivative, got create_graph=True");
    const auto saved = ctx->get_saved_variables();
    const auto &x = saved[0], &scale = saved[1], &zero_point = saved[2];
    const auto axis = ctx->saved_data["axis"].toOptional<int64_t>();
    const int64_t qmin = ctx->saved_data["qmin"].toInt(), qmax = ctx->saved_data["qmax"].toInt();
    const double gradient_scale = ctx->saved_data["gradient_scale"].toDouble();
    at::Tensor dx, dscale;
    const auto strides = c10::asIntArrayRefSlowOpt(x.sym_strides());
    if (strides.has_value() && is_plain(x) && is_ours_alone(grads[0], *strides)) {
      dx = grads[0];
      dscale = learned_backward_inplace(dx, x, scale, zero_point, axis, qmin, qmax, gradient_scale);
    } else {
      std::tie(dx, dscale) =
          fake_quantize_learned_backward(grads[0], x, scale, zero_point, axis, qmin, qmax, gradient_scale);
    }
    // The engine drops what nobody asked for.
    return {dx, dscale, {}, {}, {}, {}, {}};
  }
};

at::Tensor learned_autograd(const at::Tensor& x, const at::Tensor& scale, const at::Tensor& zero_point,
                            std::optional<int64_t> axis, int64_t qmin, int64_t qmax, double gradient_scale) {
  if (!at::GradMode::is_enabled() || !(x.requires_grad() || scale.requires_grad())) {
    at::AutoDispatchBelowADInplaceOrView guard;
    return fake_quantize_learned(x, scale, zero_point, axis, qmin, qmax, gradient_scale);
  }
  return FakeQuantizeLearned::apply(x, scale, zero_point, axis, qmin, qmax, gradient_scale);
}

/// Its results do not require a gradient.
std::tuple<at::Tensor, at::Tensor> learned_backward_autograd(const at::Tensor& grad, const at::Tensor& x,
                                                             const at::Tensor& scale, const at::Tensor& zero_point,
                                                             std::optional<int64_t> axis, int64_t qmin, int64_t qmax,
                                                             double gradient_scale) {
  at::AutoDispatchBelowAutograd guard;
  return fake_quantize_learned_backward(grad, x, scale, zero_point, axis, qmin, qmax, gradient_scale);
}

}  // namespace

TORCH_LIBRARY_IMPL(rarefy, Autograd, m) {
  m.impl("fake_quantize_learned", &learned_autograd);
  m.impl("fake_quantize_learned_backward", &learned_backward_autograd);
}

}  // namespace rarefy::ops
