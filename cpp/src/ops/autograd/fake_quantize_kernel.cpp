#include <ATen/core/dispatch/Dispatcher.h>
#include <rarefy/ops/fake_quantize.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include <type_traits>
#include <utility>

#include "ops/autograd/mask_gradient.h"
#include "ops/autograd/not_differentiable.h"

namespace rarefy::ops {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::Variable;
using torch::autograd::variable_list;

at::Tensor masked(AutogradContext* ctx, const variable_list& grads) {
  const auto strides = ctx->saved_data["strides"].toSymIntVector();
  const auto mask = ctx->get_saved_variables()[0];
  return mask_gradient(grads[0], mask, strides);
}

void save(AutogradContext* ctx, const at::Tensor& mask, c10::SymIntArrayRef strides) {
  ctx->save_for_backward({mask});
  ctx->saved_data["strides"] = strides.vec();
}

class FakeQuantize : public torch::autograd::Function<FakeQuantize> {
 public:
  static Variable forward(AutogradContext* ctx, const Variable& x, const Variable& scale, const Variable& zero_point,
                          std::optional<int64_t> axis, int64_t qmin, int64_t qmax) {
    at::AutoDispatchBelowADInplaceOrView guard;
    auto [out, mask] = fake_quantize_mask(x, scale, zero_point, axis, qmin, qmax);
    save(ctx, mask, out.sym_strides());
    return out;
  }
  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    return {masked(ctx, grads), {}, {}, {}, {}, {}};
  }
};

/// fake_quantize_backward is linear in its gradient, by the mask again: that is the second derivative.
class FakeQuantizeBackward : public torch::autograd::Function<FakeQuantizeBackward> {
 public:
  static Variable forward(AutogradContext* ctx, const Variable& grad, const Variable& mask,
                          c10::SymIntArrayRef strides) {
    at::AutoDispatchBelowADInplaceOrView guard;
    save(ctx, mask, strides);
    return fake_quantize_backward(grad, mask, strides);
  }
  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    return {masked(ctx, grads), {}, {}};
  }
};

std::tuple<at::Tensor, at::Tensor> observe_fake_quantize_mask(const at::Tensor& x, at::Tensor& min_val,
                                                              at::Tensor& max_val, at::Tensor& scale,
                                                              at::Tensor& zero_point, at::Tensor& skipped,
                                                              std::optional<int64_t> axis,
                                                              std::optional<double> averaging_constant, int64_t qmin,
                                                              int64_t qmax, bool symmetric) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("rarefy::observe_fake_quantize_mask", "")
                             .typed<decltype(observe_fake_quantize_mask)>();
  return op.call(x, min_val, max_val, scale, zero_point, skipped, axis, averaging_constant, qmin, qmax, symmetric);
}

class ObserveFakeQuantize : public torch::autograd::Function<ObserveFakeQuantize> {
 public:
  static Variable forward(AutogradContext* ctx, const Variable& x, Variable min_val, Variable max_val, Variable scale,
                          Variable zero_point, Variable skipped, std::optional<int64_t> axis,
                          std::optional<double> averaging_constant, int64_t qmin, int64_t qmax, bool symmetric) {
    at::AutoDispatchBelowAutograd guard;
    auto [out, mask] = observe_fake_quantize_mask(x, min_val, max_val, scale, zero_point, skipped, axis,
                                                  averaging_constant, qmin, qmax, symmetric);
    save(ctx, mask, out.sym_strides());
    return out;
  }
  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    return {masked(ctx, grads), {}, {}, {}, {}, {}, {}, {}, {}, {}, {}};
  }
};

bool is_differentiated(const at::Tensor& x) { return x.requires_grad() && at::GradMode::is_enabled(); }

at::Tensor fake_quantize_autograd(const at::Tensor& x, const at::Tensor& scale, const at::Tensor& zero_point,
                                  std::optional<int64_t> axis, int64_t qmin, int64_t qmax) {
  if (!is_differentiated(x)) {  // no mask is needed
    at::AutoDispatchBelowADInplaceOrView guard;
    return fake_quantize(x, scale, zero_point, axis, qmin, qmax);
  }
  return FakeQuantize::apply(x, scale, zero_point, axis, qmin, qmax);
}

at::Tensor fake_quantize_backward_autograd(const at::Tensor& grad, const at::Tensor& mask,
                                           c10::SymIntArrayRef strides) {
  if (!is_differentiated(grad)) {
    at::AutoDispatchBelowADInplaceOrView guard;
    return fake_quantize_backward(grad, mask, strides);
  }
  return FakeQuantizeBackward::apply(grad, mask, strides);
}

/// The state is written in place, outside of what autograd records.
void check_state(const char* function, const at::Tensor& min_val, const at::Tensor& max_val, const at::Tensor& scale) {
  for (const auto& [tensor, name] : {std::pair{&min_val, "min_val"}, {&max_val, "max_val"}, {&scale, "scale"}}) {
    TORCH_CHECK_VALUE(!tensor->requires_grad(), "[", function, "] ", name,
                      " is written in place and must not require a gradient");
  }
}

void observe_autograd(const at::Tensor& x, at::Tensor& min_val, at::Tensor& max_val, at::Tensor& scale,
                      at::Tensor& zero_point, at::Tensor& skipped, std::optional<int64_t> axis,
                      std::optional<double> averaging_constant, int64_t qmin, int64_t qmax, bool symmetric) {
  check_state("observe", min_val, max_val, scale);
  at::AutoDispatchBelowAutograd guard;
  observe(x, min_val, max_val, scale, zero_point, skipped, axis, averaging_constant, qmin, qmax, symmetric);
}

at::Tensor observe_fake_quantize_autograd(const at::Tensor& x, at::Tensor& min_val, at::Tensor& max_val,
                                          at::Tensor& scale, at::Tensor& zero_point, at::Tensor& skipped,
                                          std::optional<int64_t> axis, std::optional<double> averaging_constant,
                                          int64_t qmin, int64_t qmax, bool symmetric) {
  check_state("observe_fake_quantize", min_val, max_val, scale);
  if (!is_differentiated(x)) {
    at::AutoDispatchBelowAutograd guard;
    return observe_fake_quantize(x, min_val, max_val, scale, zero_point, skipped, axis, averaging_constant, qmin, qmax,
                                 symmetric);
  }
  return ObserveFakeQuantize::apply(x, min_val, max_val, scale, zero_point, skipped, axis, averaging_constant, qmin,
                                    qmax, symmetric);
}

/// An operator that writes its tensor arguments number 1 to 5: their versions go up, as after any in-place operation, so
/// that autograd notices when it had saved one of them.
template <auto op>
struct WritesState;
template <typename Result, typename... Rest,
          Result (*op)(const at::Tensor&, at::Tensor&, at::Tensor&, at::Tensor&, at::Tensor&, at::Tensor&, Rest...)>
struct WritesState<op> {
  static Result call(const at::Tensor& x, at::Tensor& min_val, at::Tensor& max_val, at::Tensor& scale,
                     at::Tensor& zero_point, at::Tensor& skipped, Rest... rest) {
    const auto bump = [&] {
      for (const auto* state : {&min_val, &max_val, &scale, &zero_point, &skipped}) {
        if (!state->is_inference()) {
          state->unsafeGetTensorImpl()->bump_version();
        }
      }
    };
    at::AutoDispatchBelowADInplaceOrView guard;
    if constexpr (std::is_void_v<Result>) {
      op(x, min_val, max_val, scale, zero_point, skipped, rest...);
      bump();
    } else {
      auto result = op(x, min_val, max_val, scale, zero_point, skipped, rest...);
      bump();
      return result;
    }
  }
};

}  // namespace

TORCH_LIBRARY_IMPL(rarefy, Autograd, m) {
  m.impl("fake_quantize", &fake_quantize_autograd);
  m.impl("fake_quantize_mask", &NotDifferentiable<&fake_quantize_mask>::call);
  m.impl("fake_quantize_backward", &fake_quantize_backward_autograd);
  m.impl("quantize", &NotDifferentiable<&quantize>::call);
  m.impl("observe", &observe_autograd);
  m.impl("observe_fake_quantize", &observe_fake_quantize_autograd);
  m.impl("observe_fake_quantize_mask", &NotDifferentiable<&observe_fake_quantize_mask>::call);
  m.impl("choose_qparams", &NotDifferentiable<&choose_qparams>::call);
}

TORCH_LIBRARY_IMPL(rarefy, ADInplaceOrView, m) {
  m.impl("observe", &WritesState<&observe>::call);
  m.impl("observe_fake_quantize", &WritesState<&observe_fake_quantize>::call);
  m.impl("observe_fake_quantize_mask", &WritesState<&observe_fake_quantize_mask>::call);
}

}  // namespace rarefy::ops
