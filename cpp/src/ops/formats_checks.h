// The argument rules of the operators on formats, applied by every backend's kernel.
#pragma once

#include <c10/core/SymIntArrayRef.h>

#include "ops/fake_quantize_checks.h"
#include "ops/minifloat.h"

namespace rarefy::ops {

/// What shares a scale: the resolved axis (-1: the tensor) and the sizes of blocks along it.
struct Sharing {
  int64_t axis = -1;
  std::vector<c10::SymInt> block;  // empty, {size} along axis, or {rows, columns} of the last two axes
};

/// Everything about axis and block that needs no values. A block size of -1 is the whole axis.
inline Sharing check_sharing(const char* function, const at::Tensor& x, std::optional<int64_t> axis,
                             c10::SymIntArrayRef block) {
  check_float(function, x, "input");
  TORCH_CHECK_VALUE(block.size() <= 2, "[", function, "] block must have at most 2 sizes, got ", block.size());
  if (block.empty()) {
    return {resolve_axis(function, x, axis), {}};
  }
  TORCH_CHECK_VALUE(axis.has_value(), "[", function, "] blocks must be along an axis, got none");
  Sharing sharing{resolve_axis(function, x, axis), block.vec()};
  TORCH_CHECK_VALUE(block.size() == 1 || (x.dim() >= 2 && sharing.axis == x.dim() - 1), "[", function,
                    "] blocks of rows and columns must be of the last two axes, got axis ", *axis, " of ", x.dim());
  for (size_t i = 0; i < sharing.block.size(); ++i) {
    const auto size = x.sym_size(sharing.axis - static_cast<int64_t>(sharing.block.size() - 1 - i));
    TORCH_CHECK_VALUE(size != 0, "[", function, "] the axis of blocks must not be empty, got shape ", x.sym_sizes());
    if (sharing.block[i] == -1) {
      sharing.block[i] = size;
    }
    TORCH_CHECK_VALUE(sharing.block[i] >= 1, "[", function,
                      "] block sizes must be at least 1, or -1 for the whole axis, got ", sharing.block[i]);
  }
  return sharing;
}

/// The shape of the scales.
inline std::vector<c10::SymInt> scale_sizes(const at::Tensor& x, const Sharing& sharing) {
  if (sharing.axis < 0) {
    return {1};
  }
  if (sharing.block.empty()) {
    return {x.sym_size(sharing.axis)};
  }
  auto sizes = x.sym_sizes().vec();
  const auto last = static_cast<size_t>(sharing.axis);
  for (size_t i = 0; i < sharing.block.size(); ++i) {
    auto& size = sizes[last - (sharing.block.size() - 1 - i)];
    size = (size + sharing.block[i] - 1) / sharing.block[i];
  }
  return sizes;
}

inline void check_shared(const char* function, const at::Tensor& x, const Sharing& sharing, const at::Tensor& parameter,
                         const char* name) {
  const auto sizes = scale_sizes(x, sharing);
  const bool one = sharing.axis < 0 && parameter.sym_numel() == 1;
  TORCH_CHECK_VALUE(one || parameter.sym_sizes() == c10::SymIntArrayRef(sizes), "[", function, "] ", name,
                    " must have shape ", c10::SymIntArrayRef(sizes), ", got ", parameter.sym_sizes());
  TORCH_CHECK_VALUE(parameter.device() == x.device(), "[", function, "] ", name, " must be on the input's device ",
                    x.device(), ", got ", parameter.device());
}

inline void check_scale(const char* function, const at::Tensor& x, const Sharing& sharing, const at::Tensor& scale) {
  TORCH_CHECK_TYPE(scale.scalar_type() == at::kFloat || scale.scalar_type() == at::kDouble, "[", function,
                   "] scale must be float32 or float64, got ", scale.scalar_type());
  check_shared(function, x, sharing, scale, "scale");
}

inline void check_seed(const char* function, const std::optional<at::Tensor>& seed) {
  TORCH_CHECK_VALUE(!seed.has_value() || (seed->scalar_type() == at::kLong && seed->sym_numel() == 2), "[", function,
                    "] seed must be two int64 numbers (the seed and the number of the call), got ",
                    seed.has_value() ? seed->sym_numel() : c10::SymInt(0), " of ",
                    seed.has_value() ? seed->scalar_type() : at::kLong);
}

/// Of fake_quantize_group and what belongs to it.
inline Sharing check_group(const char* function, const at::Tensor& x, const at::Tensor& scale,
                           const at::Tensor& zero_point, std::optional<int64_t> axis, c10::SymIntArrayRef block,
                           int64_t qmin, int64_t qmax) {
  auto sharing = check_sharing(function, x, axis, block);
  check_range(function, qmin, qmax);
  check_scale(function, x, sharing, scale);
  TORCH_CHECK_TYPE(zero_point.scalar_type() == at::kInt, "[", function, "] zero_point must be int32, got ",
                   zero_point.scalar_type());
  check_shared(function, x, sharing, zero_point, "zero_point");
  return sharing;
}

inline void check_same_input(const char* function, const at::Tensor& grad, const at::Tensor& x) {
  TORCH_CHECK_VALUE(grad.sym_sizes() == x.sym_sizes() && grad.scalar_type() == x.scalar_type(), "[", function,
                    "] grad must have the input's shape ", x.sym_sizes(), " and dtype ", x.scalar_type(), ", got ",
                    grad.sym_sizes(), " and ", grad.scalar_type());
}

}  // namespace rarefy::ops
