#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/isfinite.h>

#include <cmath>

namespace rarefy::pruning {

/// Whether no element is NaN or infinite. A sum reads a tensor once and needs no memory; it is not finite when an element
/// is not, and seldom otherwise.
inline bool is_finite(const at::Tensor& tensor) {
  return tensor.numel() == 0 || std::isfinite(tensor.sum().item<double>()) || at::isfinite(tensor).all().item<bool>();
}

}  // namespace rarefy::pruning
