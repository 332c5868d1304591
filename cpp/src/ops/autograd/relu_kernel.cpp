#include <ATen/ops/relu.h>
#include <rarefy/ops/relu.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include "ops/autograd/mask_gradient.h"
#include "ops/fake_quantize_checks.h"

namespace rarefy::ops {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::Variable;
using torch::autograd::variable_list;

bool is_differentiated(const at::Tensor& x) { return x.requires_grad() && at::GradMode::is_enabled(); }

void save(AutogradContext* ctx, const at::Tensor& mask, c10::SymIntArrayRef strides) {
  ctx->save_for_backward({mask});
  ctx->saved_data["strides"] = strides.vec();
}

at::Tensor masked(AutogradContext* ctx, const variable_list& grads) {
  const auto strides = ctx->saved_data["strides"].toSymIntVector();
  return mask_gradient(grads[0], ctx->get_saved_variables()[0], strides);
}

at::Tensor relu_mask_inplace(at::Tensor& x) {
  static const auto op =
      c10::Dispatcher::singleton().findSchemaOrThrow("rarefy::relu_mask_", "").typed<at::Tensor(at::Tensor&)>();
  return op.call(x);
}

class Relu : public torch::autograd::Function<Relu> {
 public:
  static Variable forward(AutogradContext* ctx, const Variable& x) {
    at::AutoDispatchBelowADInplaceOrView guard;
    auto [out, mask] = relu_mask(x);
    save(ctx, mask, out.sym_strides());
    return out;
  }
  static variable_list backward(AutogradContext* ctx, const variable_list& grads) { return {masked(ctx, grads)}; }
};

class ReluInplace : public torch::autograd::Function<ReluInplace> {
 public:
  static Variable forward(AutogradContext* ctx, Variable x) {
    at::AutoDispatchBelowADInplaceOrView guard;
    if (x.is_non_overlapping_and_dense()) {
      save(ctx, relu_mask_inplace(x), x.sym_strides());
    } else {
      auto [out, mask] = relu_mask(x);
      x.copy_(out);
      save(ctx, mask, out.sym_strides());
    }
    ctx->mark_dirty({x});
    return x;
  }
  static variable_list backward(AutogradContext* ctx, const variable_list& grads) { return {masked(ctx, grads)}; }
};

at::Tensor relu_autograd(const at::Tensor& x) {
  check_float("relu", x, "input");
  if (!is_differentiated(x)) {
    at::AutoDispatchBelowADInplaceOrView guard;
    return at::relu(x);
  }
  return Relu::apply(x);
}

void relu_inplace_autograd(at::Tensor& x) {
  check_float("relu_", x, "input");
  if (!is_differentiated(x)) {
    at::relu_(x);
  } else {
    ReluInplace::apply(x);
  }
}

std::tuple<at::Tensor, at::Tensor> relu_mask_not_differentiable(const at::Tensor& x) {
  at::AutoDispatchBelowADInplaceOrView guard;
  return relu_mask(x);
}

/// Without autograd: in inference mode, or called below it.
at::Tensor relu_plain(const at::Tensor& x) {
  check_float("relu", x, "input");
  return at::relu(x);
}

void relu_inplace_plain(at::Tensor& x) {
  check_float("relu_", x, "input");
  at::relu_(x);
}

}  // namespace

TORCH_LIBRARY_IMPL(rarefy, Autograd, m) {
  m.impl("relu", &relu_autograd);
  m.impl("relu_", &relu_inplace_autograd);
  m.impl("relu_mask", &relu_mask_not_differentiable);
}

TORCH_LIBRARY_IMPL(rarefy, CompositeExplicitAutograd, m) {
  m.impl("relu", &relu_plain);
  m.impl("relu_", &relu_inplace_plain);
}

}  // namespace rarefy::ops
