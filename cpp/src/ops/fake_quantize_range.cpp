// Schema of fake_quantize_range, and its kernels from torch's elementwise operators and sums.
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/clamp.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/round.h>
#include <ATen/ops/where.h>
#include <ATen/ops/zeros_like.h>
#include <rarefy/ops/fake_quantize_range.h>
#include <torch/library.h>

#include <vector>

#include "ops/fake_quantize_range_anywhere.h"
#include "ops/fake_quantize_range_checks.h"

TORCH_LIBRARY_FRAGMENT(rarefy, m) {
  m.def(
      "fake_quantize_range(Tensor x, Tensor scale, Tensor low, Tensor high, int? axis, float gradient_scale=1.0) -> "
      "Tensor");
  m.def(
      "fake_quantize_range_backward(Tensor grad, Tensor x, Tensor scale, Tensor low, Tensor high, int? axis, float "
      "gradient_scale) -> (Tensor, Tensor, Tensor, Tensor)");
}

namespace rarefy::ops {
namespace {

/// Parameters as they meet x, and the dimensions that their gradients are summed over.
struct Channels {
  std::vector<int64_t> shape, others;
  at::ScalarType type;

  Channels(const at::Tensor& x, int64_t axis)
      : shape(static_cast<size_t>(x.dim()), 1), type(x.scalar_type() == at::kDouble ? at::kDouble : at::kFloat) {
    for (int64_t i = 0; i < x.dim(); ++i) {
      if (i == axis) {
        shape[static_cast<size_t>(i)] = -1;
      } else {
        others.push_back(i);
      }
    }
  }
  at::Tensor operator()(const at::Tensor& parameter) const { return parameter.to(type).reshape(shape); }
  /// gradient_scale times the sums of the values, as float32 of the parameter's shape.
  at::Tensor sums(const at::Tensor& values, const at::Tensor& parameter, double gradient_scale) const {
    // sum over no axes would be the sum over all of them.
    const auto total = others.empty() ? values.to(at::kDouble) : values.sum(others, /*keepdim=*/false, at::kDouble);
    return (total * gradient_scale).to(at::kFloat).reshape(parameter.sizes());
  }
};

}  // namespace

at::Tensor range_anywhere(const at::Tensor& x, const at::Tensor& scale, const at::Tensor& low, const at::Tensor& high,
                          std::optional<int64_t> axis, double gradient_scale) {
  const Channels channels(x, check_learned_range("fake_quantize_range", x, scale, low, high, axis, gradient_scale));
  const auto s = channels(scale);
  const auto q =
      at::clamp((x.to(channels.type) / s).round_(), at::round(channels(low) / s), at::round(channels(high) / s));
  return at::empty_like(x).copy_((q + 0.0) * s);  // + 0: no negative zero
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> range_backward_anywhere(
    const at::Tensor& grad, const at::Tensor& x, const at::Tensor& scale, const at::Tensor& low, const at::Tensor& high,
    std::optional<int64_t> axis, double gradient_scale) {
  constexpr const char* function = "fake_quantize_range_backward";
  const Channels channels(x, check_learned_range(function, x, scale, low, high, axis, gradient_scale));
  check_learned_gradient(function, grad, x);
  const auto value = x.to(channels.type), g = grad.to(channels.type);
  const auto below = value<channels(low), above = value> channels(high);
  // Selected after the product: nothing, whatever the gradient is, where x is NaN.
  const auto inside = (below.logical_or(above).logical_or_(value.isnan())).logical_not_();
  const auto zero = at::zeros_like(g);
  const auto ratio = value / channels(scale);
  const auto rounding = (at::round(ratio) - ratio).mul_(g);
  auto dx = at::empty_like(x).copy_(at::where(inside, g, zero));
  return {dx, channels.sums(at::where(inside, rounding, zero), scale, gradient_scale),
          channels.sums(at::where(below, g, zero), low, gradient_scale),
          channels.sums(at::where(above, g, zero), high, gradient_scale)};
}

at::Tensor fake_quantize_range(const at::Tensor& x, const at::Tensor& scale, const at::Tensor& low,
                               const at::Tensor& high, std::optional<int64_t> axis, double gradient_scale) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("rarefy::fake_quantize_range", "")
                             .typed<decltype(fake_quantize_range)>();
  return op.call(x, scale, low, high, axis, gradient_scale);
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> fake_quantize_range_backward(
    const at::Tensor& grad, const at::Tensor& x, const at::Tensor& scale, const at::Tensor& low, const at::Tensor& high,
    std::optional<int64_t> axis, double gradient_scale) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("rarefy::fake_quantize_range_backward", "")
                             .typed<decltype(fake_quantize_range_backward)>();
  return op.call(grad, x, scale, low, high, axis, gradient_scale);
}

TORCH_LIBRARY_IMPL(rarefy, CompositeExplicitAutograd, m) {
  m.impl("fake_quantize_range", &range_anywhere);
  m.impl("fake_quantize_range_backward", &range_backward_anywhere);
}

}  // namespace rarefy::ops
