#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <rarefy/ops/fake_quantize_learned.h>
#include <torch/library.h>

#include "ops/fake_quantize_learned_checks.h"

namespace rarefy::ops {
namespace {

at::Tensor learned_meta(const at::Tensor& x, const at::Tensor& scale, const at::Tensor& zero_point,
                        std::optional<int64_t> axis, int64_t qmin, int64_t qmax, double gradient_scale) {
  check_learned("fake_quantize_learned", x, scale, zero_point, axis, qmin, qmax, gradient_scale);
  return at::empty_like(x);
}

std::tuple<at::Tensor, at::Tensor> learned_backward_meta(const at::Tensor& grad, const at::Tensor& x,
                                                         const at::Tensor& scale, const at::Tensor& zero_point,
                                                         std::optional<int64_t> axis, int64_t qmin, int64_t qmax,
                                                         double gradient_scale) {
  constexpr const char* function = "fake_quantize_learned_backward";
  check_learned(function, x, scale, zero_point, axis, qmin, qmax, gradient_scale);
  check_learned_gradient(function, grad, x);
  return {at::empty_like(x), at::empty_symint(scale.sym_sizes(), scale.options())};
}

at::Tensor learned_backward_inplace_meta(at::Tensor& grad, const at::Tensor& x, const at::Tensor& scale,
                                         const at::Tensor& zero_point, std::optional<int64_t> axis, int64_t qmin,
                                         int64_t qmax, double gradient_scale) {
  constexpr const char* function = "fake_quantize_learned_backward_";
  check_learned(function, x, scale, zero_point, axis, qmin, qmax, gradient_scale);
  check_learned_gradient(function, grad, x);
  return at::empty_symint(scale.sym_sizes(), scale.options());
}

}  // namespace

TORCH_LIBRARY_IMPL(rarefy, Meta, m) {
  m.impl("fake_quantize_learned", &learned_meta);
  m.impl("fake_quantize_learned_backward", &learned_backward_meta);
  m.impl("fake_quantize_learned_backward_", &learned_backward_inplace_meta);
}

}  // namespace rarefy::ops
