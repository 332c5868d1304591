// The argument rules of fake_quantize_learned, applied by every backend's kernel.
#pragma once

#include <cmath>

#include "ops/fake_quantize_checks.h"

namespace rarefy::ops {

/// Everything that can be checked without reading values. Returns the resolved axis.
inline int64_t check_learned(const char* function, const at::Tensor& x, const at::Tensor& scale,
                             const at::Tensor& zero_point, std::optional<int64_t> axis, int64_t qmin, int64_t qmax,
                             double gradient_scale) {
  const int64_t resolved = check_fake_quantize(function, x, scale, zero_point, axis, qmin, qmax);
  TORCH_CHECK_TYPE(scale.scalar_type() == at::kFloat, "[", function, "] scale must be float32, got ",
                   scale.scalar_type());
  TORCH_CHECK_VALUE(std::isfinite(gradient_scale), "[", function, "] gradient_scale must be finite, got ",
                    gradient_scale);
  return resolved;
}

inline void check_learned_gradient(const char* function, const at::Tensor& grad, const at::Tensor& x) {
  TORCH_CHECK_TYPE(grad.scalar_type() == x.scalar_type(), "[", function, "] grad must have the input's type ",
                   x.scalar_type(), ", got ", grad.scalar_type());
  TORCH_CHECK_VALUE(grad.sym_sizes() == x.sym_sizes(), "[", function, "] grad must have the input's shape ",
                    x.sym_sizes(), ", got ", grad.sym_sizes());
  TORCH_CHECK_VALUE(grad.device() == x.device(), "[", function, "] grad must be on the input's device ", x.device(),
                    ", got ", grad.device());
}

/// The gradient takes x's place in memory order, so both are dense with the same strides.
inline void check_learned_in_place(const char* function, const at::Tensor& grad, const at::Tensor& x) {
  check_dense_strides(function, x.sizes(), x.strides());
  TORCH_CHECK_VALUE(grad.strides() == x.strides(), "[", function, "] grad must have the input's strides ", x.strides(),
                    ", got ", grad.strides());
}

}  // namespace rarefy::ops
