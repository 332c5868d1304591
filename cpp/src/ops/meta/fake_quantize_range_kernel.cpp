#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <rarefy/ops/fake_quantize_range.h>
#include <torch/library.h>

#include "ops/fake_quantize_range_checks.h"

namespace rarefy::ops {
namespace {

at::Tensor range_meta(const at::Tensor& x, const at::Tensor& scale, const at::Tensor& low, const at::Tensor& high,
                      std::optional<int64_t> axis, double gradient_scale) {
  check_learned_range("fake_quantize_range", x, scale, low, high, axis, gradient_scale);
  return at::empty_like(x);
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> range_backward_meta(
    const at::Tensor& grad, const at::Tensor& x, const at::Tensor& scale, const at::Tensor& low, const at::Tensor& high,
    std::optional<int64_t> axis, double gradient_scale) {
  constexpr const char* function = "fake_quantize_range_backward";
  check_learned_range(function, x, scale, low, high, axis, gradient_scale);
  check_learned_gradient(function, grad, x);
  const auto like = [](const at::Tensor& parameter) {
    return at::empty_symint(parameter.sym_sizes(), parameter.options());
  };
  return {at::empty_like(x), like(scale), like(low), like(high)};
}

}  // namespace

TORCH_LIBRARY_IMPL(rarefy, Meta, m) {
  m.impl("fake_quantize_range", &range_meta);
  m.impl("fake_quantize_range_backward", &range_backward_meta);
}

}  // namespace rarefy::ops
