#include <ATen/core/dispatch/Dispatcher.h>
#include <rarefy/ops/fake_quantize.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

namespace rarefy::ops {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::Variable;
using torch::autograd::variable_list;

void save(AutogradContext* ctx, const at::Tensor& x, const at::Tensor& mask) {
  ctx->save_for_backward({mask});
  ctx->saved_data["strides"] = x.sym_strides().vec();
}

at::Tensor masked(AutogradContext* ctx, const at::Tensor& grad) {
  const auto strides = ctx->saved_data["strides"].toSymIntVector();
  return fake_quantize_backward(grad, ctx->get_saved_variables()[0], strides);
}

class FakeQuantize : public torch::autograd::Function<FakeQuantize> {
 public:
  static Variable forward(AutogradContext* ctx, const Variable& x, const Variable& scale, const Variable& zero_point,
                          std::optional<int64_t> axis, int64_t qmin, int64_t qmax) {
    at::AutoDispatchBelowADInplaceOrView guard;
    auto [out, mask] = fake_quantize_mask(x, scale, zero_point, axis, qmin, qmax);
    save(ctx, out, mask);
    return out;
  }
  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    return {masked(ctx, grads[0]), {}, {}, {}, {}, {}};
  }
};

std::tuple<at::Tensor, at::Tensor> call_observe_fake_quantize_mask(
    const at::Tensor& x, at::Tensor& min_val, at::Tensor& max_val, at::Tensor& scale, at::Tensor& zero_point,
    std::optional<int64_t> axis, std::optional<double> averaging_constant, int64_t qmin, int64_t qmax, bool symmetric) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("rarefy::observe_fake_quantize_mask", "")
                             .typed<decltype(call_observe_fake_quantize_mask)>();
  return op.call(x, min_val, max_val, scale, zero_point, axis, averaging_constant, qmin, qmax, symmetric);
}

class ObserveFakeQuantize : public torch::autograd::Function<ObserveFakeQuantize> {
 public:
  static Variable forward(AutogradContext* ctx, const Variable& x, Variable min_val, Variable max_val, Variable scale,
                          Variable zero_point, std::optional<int64_t> axis, std::optional<double> averaging_constant,
                          int64_t qmin, int64_t qmax, bool symmetric) {
    at::AutoDispatchBelowADInplaceOrView guard;
    auto [out, mask] = call_observe_fake_quantize_mask(x, min_val, max_val, scale, zero_point, axis, averaging_constant,
                                                       qmin, qmax, symmetric);
    save(ctx, out, mask);
    return out;
  }
  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    return {masked(ctx, grads[0]), {}, {}, {}, {}, {}, {}, {}, {}, {}};
  }
};

at::Tensor fake_quantize_autograd(const at::Tensor& x, const at::Tensor& scale, const at::Tensor& zero_point,
                                  std::optional<int64_t> axis, int64_t qmin, int64_t qmax) {
  if (!x.requires_grad() || !at::GradMode::is_enabled()) {  // no mask is needed
    at::AutoDispatchBelowADInplaceOrView guard;
    return fake_quantize(x, scale, zero_point, axis, qmin, qmax);
  }
  return FakeQuantize::apply(x, scale, zero_point, axis, qmin, qmax);
}

at::Tensor observe_fake_quantize_autograd(const at::Tensor& x, at::Tensor& min_val, at::Tensor& max_val,
                                          at::Tensor& scale, at::Tensor& zero_point, std::optional<int64_t> axis,
                                          std::optional<double> averaging_constant, int64_t qmin, int64_t qmax,
                                          bool symmetric) {
  if (!x.requires_grad() || !at::GradMode::is_enabled()) {
    at::AutoDispatchBelowADInplaceOrView guard;
    return observe_fake_quantize(x, min_val, max_val, scale, zero_point, axis, averaging_constant, qmin, qmax, symmetric);
  }
  return ObserveFakeQuantize::apply(x, min_val, max_val, scale, zero_point, axis, averaging_constant, qmin, qmax,
                                    symmetric);
}

}  // namespace

TORCH_LIBRARY_IMPL(rarefy, Autograd, m) {
  m.impl("fake_quantize", &fake_quantize_autograd);
  m.impl("observe_fake_quantize", &observe_fake_quantize_autograd);
}

}  // namespace rarefy::ops
