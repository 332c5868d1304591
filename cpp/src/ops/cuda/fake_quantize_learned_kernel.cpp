// A learned scale on the GPU: the kernel of fake_quantize forward, torch's elementwise operators and sum backward.
#include <ATen/ops/empty_like.h>
#include <ATen/ops/isnan.h>
#include <ATen/ops/round.h>
#include <ATen/ops/where.h>
#include <ATen/ops/zeros_like.h>
#include <c10/core/DeviceGuard.h>
#include <rarefy/ops/fake_quantize.h>
#include <rarefy/ops/fake_quantize_learned.h>
#include <torch/library.h>

#include <vector>

#include "ops/fake_quantize_learned_checks.h"

namespace rarefy::ops {
namespace {

at::Tensor learned_cuda(const at::Tensor& x, const at::Tensor& scale, const at::Tensor& zero_point,
                        std::optional<int64_t> axis, int64_t qmin, int64_t qmax, double gradient_scale) {
  check_learned("fake_quantize_learned", x, scale, zero_point, axis, qmin, qmax, gradient_scale);
  return fake_quantize(x, scale, zero_point, axis, qmin, qmax);
}

struct LearnedGradient {
  at::Tensor inside;
  at::Tensor dscale;
};

LearnedGradient learned_gradient(const at::Tensor& grad, const at::Tensor& x, const at::Tensor& scale,
                                 const at::Tensor& zero_point, int64_t axis, int64_t qmin, int64_t qmax,
                                 double gradient_scale) {
  const auto type = x.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
  std::vector<int64_t> shape(static_cast<size_t>(x.dim()), 1), others;
  for (int64_t i = 0; i < x.dim(); ++i) {
    if (i == axis) {
      shape[static_cast<size_t>(i)] = x.size(i);
    } else {
      others.push_back(i);
    }
  }
  const auto s = scale.to(type).reshape(shape), z = zero_point.to(type).reshape(shape);
  const auto ratio = x.to(type) / s;
  const auto rounded = at::round(ratio);
  const auto q = rounded + z;
  auto inside = q.ge(qmin).logical_and_(q.le(qmax));
  const auto t = at::where(inside, rounded - ratio, q.clamp(qmin, qmax) - z);
  const auto product = grad.to(type) * t;
  // Selected after the product: 0, whatever the gradient is, where x is NaN.
  const auto counted = at::where(at::isnan(q), at::zeros_like(product), product);
  // sum over no axes would be the sum over all of them.
  const auto sums = others.empty() ? counted.to(at::kDouble) : counted.sum(others, /*keepdim=*/false, at::kDouble);
  return {inside, (sums * gradient_scale).to(at::kFloat).reshape(scale.sizes())};
}

std::tuple<at::Tensor, at::Tensor> learned_backward_cuda(const at::Tensor& grad, const at::Tensor& x,
                                                         const at::Tensor& scale, const at::Tensor& zero_point,
                                                         std::optional<int64_t> axis, int64_t qmin, int64_t qmax,
                                                         double gradient_scale) {
  constexpr const char* function = "fake_quantize_learned_backward";
  const int64_t resolved = check_learned(function, x, scale, zero_point, axis, qmin, qmax, gradient_scale);
  check_learned_gradient(function, grad, x);
  const c10::DeviceGuard guard(x.device());
  const auto [inside, dscale] = learned_gradient(grad, x, scale, zero_point, resolved, qmin, qmax, gradient_scale);
  auto dx = at::empty_like(x);
  dx.copy_(at::where(inside, grad, at::zeros_like(grad)));
  return {dx, dscale};
}

at::Tensor learned_backward_inplace_cuda(at::Tensor& grad, const at::Tensor& x, const at::Tensor& scale,
                                         const at::Tensor& zero_point, std::optional<int64_t> axis, int64_t qmin,
                                         int64_t qmax, double gradient_scale) {
  constexpr const char* function = "fake_quantize_learned_backward_";
  const int64_t resolved = check_learned(function, x, scale, zero_point, axis, qmin, qmax, gradient_scale);
  check_learned_gradient(function, grad, x);
  check_learned_in_place(function, grad, x);
  const c10::DeviceGuard guard(x.device());
  const auto [inside, dscale] = learned_gradient(grad, x, scale, zero_point, resolved, qmin, qmax, gradient_scale);
  grad.masked_fill_(inside.logical_not(), 0);
  return dscale;
}

}  // namespace

TORCH_LIBRARY_IMPL(rarefy, CUDA, m) {
  m.impl("fake_quantize_learned", &learned_cuda);
  m.impl("fake_quantize_learned_backward", &learned_backward_cuda);
  m.impl("fake_quantize_learned_backward_", &learned_backward_inplace_cuda);
}

}  // namespace rarefy::ops
