// The straight-through estimator without a clip: the gradient of the result is that of the input.
#pragma once

#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/Tensor.h>
#include <ATen/core/grad_mode.h>
#include <torch/csrc/autograd/custom_function.h>

#include <functional>
#include <utility>

namespace rarefy::ops {

class StraightThroughFunction : public torch::autograd::Function<StraightThroughFunction> {
 public:
  static at::Tensor forward(torch::autograd::AutogradContext*, const at::Tensor& /*x*/,
                            const std::function<at::Tensor()>& compute) {
    at::AutoDispatchBelowADInplaceOrView guard;
    return compute();
  }
  static torch::autograd::variable_list backward(torch::autograd::AutogradContext*,
                                                 const torch::autograd::variable_list& grads) {
    return {grads[0], {}};
  }
};

/// compute() with the gradient of x as it comes.
inline at::Tensor pass_through(const at::Tensor& x, const std::function<at::Tensor()>& compute) {
  if (!x.requires_grad() || !at::GradMode::is_enabled()) {
    at::AutoDispatchBelowADInplaceOrView guard;
    return compute();
  }
  return StraightThroughFunction::apply(x, compute);
}

/// The Autograd kernel of an operator whose first argument is x.
template <auto op>
struct PassThrough;
template <typename... Rest, at::Tensor (*op)(const at::Tensor&, Rest...)>
struct PassThrough<op> {
  static at::Tensor call(const at::Tensor& x, Rest... rest) {
    return pass_through(x, [&]() -> at::Tensor { return op(x, rest...); });
  }
};

}  // namespace rarefy::ops
