// The argument rules of the mask operators, applied by every backend's kernel, and the number of elements to prune.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/Exception.h>

#include <cmath>
#include <cstdint>
#include <optional>

#include "ops/fake_quantize_checks.h"

namespace rarefy::ops {

inline void check_mask(const char* function, const at::Tensor& x, const at::Tensor& mask) {
  TORCH_CHECK_TYPE(mask.scalar_type() == at::kByte, "[", function, "] mask must be uint8, got ", mask.scalar_type());
  TORCH_CHECK_VALUE(mask.sym_numel() == mask_bytes(x.sym_numel()), "[", function, "] mask must hold ",
                    mask_bytes(x.sym_numel()), " bytes for ", x.sym_numel(), " elements, got ", mask.sym_numel());
  TORCH_CHECK_VALUE(mask.device() == x.device(), "[", function, "] mask must be on the tensor's device ", x.device(),
                    ", got ", mask.device());
}

inline void check_apply_mask(const at::Tensor& x, const at::Tensor& mask) {
  check_float("apply_mask_", x, "x");
  check_mask("apply_mask_", x, mask);
  for (int64_t d = 0; d < x.dim(); ++d) {
    TORCH_CHECK_VALUE(x.sym_stride(d) != 0 || x.sym_size(d) <= 1,
                      "[apply_mask_] x must not overlap itself, got stride 0 in dimension ", d, " of size ",
                      x.sym_size(d));
  }
}

inline void check_magnitude_mask(at::TensorList weights, double sparsity, const std::optional<at::TensorList>& masks) {
  constexpr const char* function = "magnitude_mask";
  TORCH_CHECK_VALUE(sparsity >= 0.0 && sparsity < 1.0, "[", function, "] sparsity must be in [0, 1), got ", sparsity);
  TORCH_CHECK_VALUE(!masks.has_value() || masks->size() == weights.size(), "[", function,
                    "] needs one mask per weight, got ", masks.has_value() ? masks->size() : 0, " masks for ",
                    weights.size(), " weights");
  for (size_t i = 0; i < weights.size(); ++i) {
    check_float(function, weights[i], "weights");
    TORCH_CHECK_VALUE(weights[i].device() == weights[0].device(), "[", function,
                      "] weights must be on one device, got ", weights[0].device(), " and ", weights[i].device());
    if (masks.has_value()) {
      check_mask(function, weights[i], (*masks)[i]);
    }
  }
}

/// round_half_even(sparsity * elements)
inline int64_t elements_to_prune(double sparsity, int64_t elements) {
  return static_cast<int64_t>(std::nearbyint(sparsity * static_cast<double>(elements)));
}

}  // namespace rarefy::ops
