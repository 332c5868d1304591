// The argument rules of fake_quantize_range, applied by every backend's kernel.
#pragma once

#include <cmath>

#include "ops/fake_quantize_learned_checks.h"

namespace rarefy::ops {

/// Everything that can be checked without reading values. Returns the resolved axis.
inline int64_t check_learned_range(const char* function, const at::Tensor& x, const at::Tensor& scale,
                                   const at::Tensor& low, const at::Tensor& high, std::optional<int64_t> axis,
                                   double gradient_scale) {
  check_float(function, x, "input");
  const int64_t resolved = resolve_axis(function, x, axis);
  for (const auto& [parameter, name] : {std::pair{&scale, "scale"}, {&low, "low"}, {&high, "high"}}) {
    TORCH_CHECK_TYPE(parameter->scalar_type() == at::kFloat, "[", function, "] ", name, " must be float32, got ",
                     parameter->scalar_type());
    check_per_axis(function, x, resolved, *parameter, name);
  }
  TORCH_CHECK_VALUE(std::isfinite(gradient_scale), "[", function, "] gradient_scale must be finite, got ",
                    gradient_scale);
  return resolved;
}

}  // namespace rarefy::ops
