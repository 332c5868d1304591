// The argument rules of the histogram operators, applied by every backend's kernel.
#pragma once

#include "ops/fake_quantize_checks.h"

namespace rarefy::ops {

/// Rules of one histogram. `name` is "hist" or "other".
inline void check_histogram(const char* function, const at::Tensor& hist, const at::Tensor& low, const at::Tensor& high,
                            const char* name) {
  constexpr int64_t kFewest = 16, kMost = 65536;
  TORCH_CHECK_TYPE(hist.scalar_type() == at::kLong, "[", function, "] ", name, " must be int64, got ",
                   hist.scalar_type());
  TORCH_CHECK_VALUE(hist.dim() == 2 && hist.sym_size(1) >= kFewest && hist.sym_size(1) <= kMost, "[", function, "] ",
                    name, " must have shape [rows, bins] with ", kFewest, " to ", kMost, " bins, got ",
                    hist.sym_sizes());
  TORCH_CHECK_VALUE(hist.is_contiguous(), "[", function, "] ", name, " must be contiguous, got strides ",
                    hist.sym_strides());
  for (const auto* end : {&low, &high}) {
    const char* side = end == &low ? "_min" : "_max";
    TORCH_CHECK_TYPE(end->scalar_type() == at::kFloat, "[", function, "] ", name, side, " must be float32, got ",
                     end->scalar_type());
    TORCH_CHECK_VALUE(end->dim() == 1 && end->sym_size(0) == hist.sym_size(0) && end->is_contiguous(), "[", function,
                      "] ", name, side, " must have shape [", hist.sym_size(0), "] and be contiguous, got ",
                      end->sym_sizes());
    TORCH_CHECK_VALUE(end->device() == hist.device(), "[", function, "] ", name, side, " must be on ", name,
                      "'s device ", hist.device(), ", got ", end->device());
  }
}

/// Returns the resolved axis.
inline int64_t check_histogram_observe(const char* function, const at::Tensor& x, const at::Tensor& hist,
                                       const at::Tensor& low, const at::Tensor& high, const at::Tensor& skipped,
                                       std::optional<int64_t> axis) {
  check_float(function, x, "input");
  const int64_t resolved = resolve_axis(function, x, axis);
  check_histogram(function, hist, low, high, "hist");
  if (resolved < 0) {
    TORCH_CHECK_VALUE(hist.sym_size(0) == 1, "[", function, "] hist must have 1 row (one for the tensor), got ",
                      hist.sym_size(0));
  } else {
    TORCH_CHECK_VALUE(hist.sym_size(0) == x.sym_size(resolved), "[", function, "] hist must have ",
                      x.sym_size(resolved), " rows (one per index of axis ", resolved, "), got ", hist.sym_size(0));
  }
  TORCH_CHECK_TYPE(skipped.scalar_type() == at::kLong, "[", function, "] skipped must be int64, got ",
                   skipped.scalar_type());
  TORCH_CHECK_VALUE(skipped.sym_numel() == 1, "[", function, "] skipped must have 1 element, got ",
                    skipped.sym_numel());
  for (const auto* tensor : {&hist, &skipped}) {
    TORCH_CHECK_VALUE(tensor->device() == x.device(), "[", function,
                      "] hist and skipped must be on the input's device ", x.device(), ", got ", tensor->device());
  }
  TORCH_CHECK_VALUE(x.sym_numel() != 0, "[", function, "] input must not be empty, got shape ", x.sym_sizes());
  return resolved;
}

inline void check_histogram_add(const char* function, const at::Tensor& hist, const at::Tensor& low,
                                const at::Tensor& high, const at::Tensor& other, const at::Tensor& other_low,
                                const at::Tensor& other_high) {
  check_histogram(function, hist, low, high, "hist");
  check_histogram(function, other, other_low, other_high, "other");
  TORCH_CHECK_VALUE(hist.sym_sizes() == other.sym_sizes(), "[", function, "] both must have one shape, got ",
                    hist.sym_sizes(), " and ", other.sym_sizes());
  TORCH_CHECK_VALUE(hist.device() == other.device(), "[", function, "] both must be on one device, got ", hist.device(),
                    " and ", other.device());
}

enum class RangeMethod { minmax, percentile, mse, sqnr, kl };

inline RangeMethod check_choose_range(const char* function, const at::Tensor& hist, const at::Tensor& low,
                                      const at::Tensor& high, const std::string& method, double parameter, int64_t qmin,
                                      int64_t qmax, bool symmetric) {
  check_histogram(function, hist, low, high, "hist");
  check_range(function, qmin, qmax);
  check_symmetric(function, qmin, qmax, symmetric);
  if (method == "minmax") {
    return RangeMethod::minmax;
  }
  if (method == "percentile") {
    TORCH_CHECK_VALUE(parameter > 50.0 && parameter <= 100.0, "[", function, "] percentile must be in (50, 100], got ",
                      parameter);
    return RangeMethod::percentile;
  }
  if (method == "mse") {
    TORCH_CHECK_VALUE(parameter >= 1.0 && parameter <= 8.0, "[", function, "] norm must be in [1, 8], got ", parameter);
    return RangeMethod::mse;
  }
  if (method == "sqnr") {
    TORCH_CHECK_VALUE(parameter >= 1.0 && std::isfinite(parameter), "[", function,
                      "] the weight of clipping must be finite and at least 1, got ", parameter);
    return RangeMethod::sqnr;
  }
  TORCH_CHECK_VALUE(method == "kl", "[", function, "] method must be minmax, percentile, mse, sqnr or kl, got '",
                    method, "'");
  return RangeMethod::kl;
}

}  // namespace rarefy::ops
