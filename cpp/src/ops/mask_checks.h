// The argument rules of the mask operators, applied by every backend's kernel, and the number of elements to prune.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/Exception.h>

#include <cmath>
#include <cstdint>
#include <optional>
#include <string>

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

/// Of magnitude_mask and score_mask; `noun` is what one tensor is, "weight" or "score".
inline void check_magnitude_mask(const char* function, const char* noun, at::TensorList values, double sparsity,
                                 const std::optional<at::TensorList>& masks) {
  TORCH_CHECK_VALUE(sparsity >= 0.0 && sparsity < 1.0, "[", function, "] sparsity must be in [0, 1), got ", sparsity);
  TORCH_CHECK_VALUE(!masks.has_value() || masks->size() == values.size(), "[", function, "] needs one mask per ", noun,
                    ", got ", masks.has_value() ? masks->size() : 0, " masks for ", values.size(), " ", noun, "s");
  const auto plural = std::string(noun) + "s";
  for (size_t i = 0; i < values.size(); ++i) {
    check_float(function, values[i], plural.c_str());
    TORCH_CHECK_VALUE(values[i].device() == values[0].device(), "[", function, "] ", plural,
                      " must be on one device, got ", values[0].device(), " and ", values[i].device());
    if (masks.has_value()) {
      check_mask(function, values[i], (*masks)[i]);
    }
  }
}

/// Of nm_mask. Returns the dimension in [0, x.dim()).
inline int64_t check_nm_mask(const at::Tensor& x, int64_t n, int64_t m, int64_t dim,
                             const std::optional<at::Tensor>& mask) {
  check_float("nm_mask", x, "x");
  TORCH_CHECK_VALUE(n >= 1 && n < m, "[nm_mask] must have 1 <= n < m, got n ", n, " and m ", m);
  TORCH_CHECK_INDEX(dim >= -x.dim() && dim < x.dim(), "[nm_mask] dim must be in [", -x.dim(), ", ", x.dim(),
                    ") for an input of ", x.dim(), " dimensions, got ", dim);
  dim = dim < 0 ? dim + x.dim() : dim;
  TORCH_CHECK_VALUE(x.sym_size(dim) >= m, "[nm_mask] dimension ", dim, " must have at least m = ", m, " elements, got ",
                    x.sym_size(dim));
  if (mask.has_value()) {
    check_mask("nm_mask", x, *mask);
  }
  return dim;
}

inline void check_unpack_mask(const at::Tensor& mask, c10::SymIntArrayRef size) {
  c10::SymInt elements = 1;
  for (const auto& s : size) {
    TORCH_CHECK_VALUE(s >= 0, "[unpack_mask] sizes must not be negative, got ", size);
    elements = elements * s;
  }
  TORCH_CHECK_TYPE(mask.scalar_type() == at::kByte, "[unpack_mask] mask must be uint8, got ", mask.scalar_type());
  TORCH_CHECK_VALUE(mask.sym_numel() == mask_bytes(elements), "[unpack_mask] mask must hold ", mask_bytes(elements),
                    " bytes for ", elements, " elements, got ", mask.sym_numel());
}

/// round_half_even(sparsity * elements)
inline int64_t elements_to_prune(double sparsity, int64_t elements) {
  return static_cast<int64_t>(std::nearbyint(sparsity * static_cast<double>(elements)));
}

}  // namespace rarefy::ops
