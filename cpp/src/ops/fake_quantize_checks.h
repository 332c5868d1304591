// The argument rules of the fake-quantize family, applied by every backend's kernel.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/Exception.h>

#include <algorithm>
#include <cstdint>
#include <optional>
#include <utility>
#include <vector>

namespace rarefy::ops {

/// The axis in [0, x.dim()), or -1 for per-tensor.
inline int64_t resolve_axis(const char* function, const at::Tensor& x, std::optional<int64_t> axis) {
  if (!axis.has_value()) {
    return -1;
  }
  TORCH_CHECK_INDEX(*axis >= -x.dim() && *axis < x.dim(), "[", function, "] axis must be in [", -x.dim(), ", ", x.dim(),
                    ") for an input of ", x.dim(), " dimensions, got ", *axis);
  return *axis < 0 ? *axis + x.dim() : *axis;
}

inline void check_range(const char* function, int64_t qmin, int64_t qmax) {
  TORCH_CHECK_VALUE(-32768 <= qmin && qmin < qmax && qmax <= 65535, "[", function,
                    "] must have -32768 <= qmin < qmax <= 65535, got qmin ", qmin, " and qmax ", qmax);
}

inline void check_float(const char* function, const at::Tensor& x, const char* name) {
  const auto type = x.scalar_type();
  TORCH_CHECK_TYPE(type == at::kFloat || type == at::kDouble || type == at::kBFloat16 || type == at::kHalf, "[",
                   function, "] ", name, " must be float32, float64, bfloat16 or float16, got ", type);
}

inline void check_per_axis(const char* function, const at::Tensor& x, int64_t axis, const at::Tensor& parameter,
                           const char* name) {
  if (axis < 0) {
    TORCH_CHECK_VALUE(parameter.sym_numel() == 1, "[", function, "] ", name,
                      " must have 1 element (one for the tensor), got ", parameter.sym_numel());
  } else {
    TORCH_CHECK_VALUE(parameter.dim() == 1 && parameter.sym_size(0) == x.sym_size(axis), "[", function, "] ", name,
                      " must have shape [", x.sym_size(axis), "] (one per index of axis ", axis, "), got ",
                      parameter.sym_sizes());
  }
  TORCH_CHECK_VALUE(parameter.device() == x.device(), "[", function, "] ", name, " must be on the input's device ",
                    x.device(), ", got ", parameter.device());
}

/// Everything that can be checked without reading values. Returns the resolved axis.
inline int64_t check_fake_quantize(const char* function, const at::Tensor& x, const at::Tensor& scale,
                                   const at::Tensor& zero_point, std::optional<int64_t> axis, int64_t qmin,
                                   int64_t qmax) {
  check_float(function, x, "input");
  check_range(function, qmin, qmax);
  const int64_t resolved = resolve_axis(function, x, axis);
  TORCH_CHECK_TYPE(scale.scalar_type() == at::kFloat || scale.scalar_type() == at::kDouble, "[", function,
                   "] scale must be float32 or float64, got ", scale.scalar_type());
  TORCH_CHECK_TYPE(zero_point.scalar_type() == at::kInt, "[", function, "] zero_point must be int32, got ",
                   zero_point.scalar_type());
  check_per_axis(function, x, resolved, scale, "scale");
  check_per_axis(function, x, resolved, zero_point, "zero_point");
  return resolved;
}

inline void check_quantized_type(const char* function, int64_t qmin, int64_t qmax) {
  TORCH_CHECK_VALUE((qmin < 0 && qmin >= -128 && qmax <= 127) || (qmin >= 0 && qmax <= 255), "[", function,
                    "] the range must fit int8 or uint8, got [", qmin, ", ", qmax, "]");
}

inline void check_symmetric(const char* function, int64_t qmin, int64_t qmax, bool symmetric) {
  TORCH_CHECK_VALUE(!symmetric || qmax - qmin >= 2, "[", function,
                    "] a symmetric range must have at least 3 integers, got [", qmin, ", ", qmax, "]");
}

inline void check_averaging_constant(const char* function, std::optional<double> constant) {
  TORCH_CHECK_VALUE(!constant.has_value() || (*constant > 0.0 && *constant <= 1.0), "[", function,
                    "] averaging_constant must be in (0, 1], got ", constant.value_or(0.0));
}

inline int64_t check_observe(const char* function, const at::Tensor& x, const at::Tensor& min_val,
                             const at::Tensor& max_val, const at::Tensor& scale, const at::Tensor& zero_point,
                             const at::Tensor& skipped, std::optional<int64_t> axis,
                             std::optional<double> averaging_constant, int64_t qmin, int64_t qmax, bool symmetric) {
  const int64_t resolved = check_fake_quantize(function, x, scale, zero_point, axis, qmin, qmax);
  check_symmetric(function, qmin, qmax, symmetric);
  check_averaging_constant(function, averaging_constant);
  for (const auto& [tensor, name] : {std::pair{&min_val, "min_val"}, {&max_val, "max_val"}, {&scale, "scale"}}) {
    TORCH_CHECK_TYPE(tensor->scalar_type() == at::kFloat, "[", function, "] ", name, " must be float32, got ",
                     tensor->scalar_type());
    check_per_axis(function, x, resolved, *tensor, name);
    TORCH_CHECK_VALUE(tensor->is_contiguous(), "[", function, "] ", name, " must be contiguous, got strides ",
                      tensor->sym_strides());
  }
  TORCH_CHECK_VALUE(zero_point.is_contiguous(), "[", function, "] zero_point must be contiguous, got strides ",
                    zero_point.sym_strides());
  TORCH_CHECK_TYPE(skipped.scalar_type() == at::kLong, "[", function, "] skipped must be int64, got ",
                   skipped.scalar_type());
  TORCH_CHECK_VALUE(skipped.sym_numel() == 1, "[", function, "] skipped must have 1 element, got ",
                    skipped.sym_numel());
  TORCH_CHECK_VALUE(skipped.device() == x.device(), "[", function, "] skipped must be on the input's device ",
                    x.device(), ", got ", skipped.device());
  TORCH_CHECK_VALUE(x.sym_numel() != 0, "[", function, "] input must not be empty, got shape ", x.sym_sizes());
  return resolved;
}

inline void check_choose_qparams(const char* function, const at::Tensor& min_val, const at::Tensor& max_val,
                                 int64_t qmin, int64_t qmax, bool symmetric) {
  check_float(function, min_val, "min_val");
  check_float(function, max_val, "max_val");
  check_range(function, qmin, qmax);
  check_symmetric(function, qmin, qmax, symmetric);
  TORCH_CHECK_VALUE(min_val.sym_sizes() == max_val.sym_sizes(), "[", function,
                    "] min_val and max_val must have one shape, got ", min_val.sym_sizes(), " and ",
                    max_val.sym_sizes());
  TORCH_CHECK_VALUE(min_val.device() == max_val.device(), "[", function,
                    "] min_val and max_val must be on one device, got ", min_val.device(), " and ", max_val.device());
}

/// Bytes of the packed mask of n elements: one bit each, whole 64-bit words.
template <typename Int>
Int mask_bytes(const Int& n) {
  return (n + 63) / 64 * 8;
}

inline void check_backward(const char* function, const at::Tensor& grad, const at::Tensor& mask) {
  check_float(function, grad, "grad");
  TORCH_CHECK_VALUE(mask.scalar_type() == at::kByte && mask.sym_numel() == mask_bytes(grad.sym_numel()), "[", function,
                    "] mask must hold ", mask_bytes(grad.sym_numel()), " bytes for ", grad.sym_numel(),
                    " elements, got ", mask.sym_numel(), " of ", mask.scalar_type());
  TORCH_CHECK_VALUE(mask.is_contiguous(), "[", function, "] mask must be contiguous, got strides ", mask.sym_strides());
  TORCH_CHECK_VALUE(mask.device() == grad.device(), "[", function, "] mask must be on the gradient's device ",
                    grad.device(), ", got ", mask.device());
}

/// Kernels write whole blocks of memory: strides with gaps or overlaps would write outside of it.
inline void check_dense_strides(const char* function, at::IntArrayRef sizes, at::IntArrayRef strides) {
  bool is_dense = sizes.size() == strides.size();
  std::vector<std::pair<int64_t, int64_t>> axes;  // stride, size
  int64_t numel = 1;
  for (size_t i = 0; is_dense && i < sizes.size(); ++i) {
    numel *= sizes[i];
    if (sizes[i] != 1) {
      axes.emplace_back(strides[i], sizes[i]);
    }
  }
  std::sort(axes.begin(), axes.end());
  int64_t expected = 1;
  for (const auto& [stride, size] : axes) {
    is_dense = is_dense && (numel == 0 || stride == expected);
    expected *= size;
  }
  TORCH_CHECK_VALUE(is_dense, "[", function, "] strides must be those of a dense tensor of shape ", sizes, ", got ",
                    strides);
}

}  // namespace rarefy::ops
