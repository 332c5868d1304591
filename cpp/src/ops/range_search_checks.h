// The argument rules of the searches for a range, applied by every backend's kernel.
#pragma once

#include <cmath>

#include "ops/fake_quantize_checks.h"

namespace rarefy::ops {

inline int64_t check_search(const char* function, const at::Tensor& x, std::optional<int64_t> axis, int64_t qmin,
                            int64_t qmax, bool symmetric) {
  check_float(function, x, "input");
  check_range(function, qmin, qmax);
  check_symmetric(function, qmin, qmax, symmetric);
  const int64_t resolved = resolve_axis(function, x, axis);
  TORCH_CHECK_VALUE(x.sym_numel() != 0, "[", function, "] input must not be empty, got shape ", x.sym_sizes());
  return resolved;
}

inline int64_t check_mse_range(const char* function, const at::Tensor& x, std::optional<int64_t> axis, int64_t qmin,
                               int64_t qmax, bool symmetric, double norm, int64_t steps, int64_t bins,
                               const std::optional<at::Tensor>& importance) {
  const int64_t resolved = check_search(function, x, axis, qmin, qmax, symmetric);
  TORCH_CHECK_VALUE(norm >= 1.0 && norm <= 8.0, "[", function, "] norm must be in [1, 8], got ", norm);
  TORCH_CHECK_VALUE(steps >= 1 && steps <= 10000, "[", function, "] steps must be in 1..10000, got ", steps);
  TORCH_CHECK_VALUE(bins == 0 || (bins >= 16 && bins <= 65536), "[", function, "] bins must be 0 or in 16..65536, got ",
                    bins);
  if (importance.has_value()) {
    check_float(function, *importance, "importance");
    TORCH_CHECK_VALUE(importance->device() == x.device(), "[", function, "] importance must be on the input's device ",
                      x.device(), ", got ", importance->device());
    bool broadcasts = importance->dim() <= x.dim();
    for (int64_t i = 1; broadcasts && i <= importance->dim(); ++i) {
      broadcasts = importance->sym_size(-i) == 1 || importance->sym_size(-i) == x.sym_size(-i);
    }
    TORCH_CHECK_VALUE(broadcasts, "[", function, "] importance must broadcast to the input's shape ", x.sym_sizes(),
                      ", got ", importance->sym_sizes());
  }
  return resolved;
}

inline int64_t check_half_quadratic(const char* function, const at::Tensor& x, std::optional<int64_t> axis,
                                    int64_t qmin, int64_t qmax, bool symmetric, double norm, double beta, double kappa,
                                    int64_t iterations) {
  const int64_t resolved = check_search(function, x, axis, qmin, qmax, symmetric);
  TORCH_CHECK_VALUE(norm > 0.0 && norm <= 1.0, "[", function, "] norm must be in (0, 1], got ", norm);
  TORCH_CHECK_VALUE(beta > 0.0 && std::isfinite(beta), "[", function, "] beta must be finite and positive, got ", beta);
  TORCH_CHECK_VALUE(kappa >= 1.0 && kappa <= 10.0, "[", function, "] kappa must be in [1, 10], got ", kappa);
  TORCH_CHECK_VALUE(iterations >= 0 && iterations <= 10000, "[", function, "] iterations must be in 0..10000, got ",
                    iterations);
  return resolved;
}

/// Rules of the ranges that record_ranges keeps.
inline void check_batch_ranges(const char* function, const at::Tensor& batch_min, const at::Tensor& batch_max) {
  for (const auto* end : {&batch_min, &batch_max}) {
    const char* name = end == &batch_min ? "batch_min" : "batch_max";
    TORCH_CHECK_TYPE(end->scalar_type() == at::kFloat, "[", function, "] ", name, " must be float32, got ",
                     end->scalar_type());
    TORCH_CHECK_VALUE(end->dim() == 2 && end->is_contiguous() && end->sym_size(0) >= 2 && end->sym_size(0) % 2 == 0,
                      "[", function, "] ", name, " must be contiguous of shape [n, channels] with an even n, got ",
                      end->sym_sizes());
  }
  TORCH_CHECK_VALUE(batch_min.sym_sizes() == batch_max.sym_sizes(), "[", function,
                    "] batch_min and batch_max must have one shape, got ", batch_min.sym_sizes(), " and ",
                    batch_max.sym_sizes());
}

inline void check_record_ranges(const char* function, const at::Tensor& batch_min, const at::Tensor& batch_max,
                                const at::Tensor& batches, const at::Tensor& low, const at::Tensor& high) {
  check_batch_ranges(function, batch_min, batch_max);
  TORCH_CHECK_TYPE(
      batches.scalar_type() == at::kLong && low.scalar_type() == at::kFloat && high.scalar_type() == at::kFloat, "[",
      function, "] batches must be int64, low and high float32, got ", batches.scalar_type(), ", ", low.scalar_type(),
      " and ", high.scalar_type());
  TORCH_CHECK_VALUE(batches.dim() == 1 && batches.sym_size(0) == 3 && batches.is_contiguous(), "[", function,
                    "] batches must have shape [3] and be contiguous, got ", batches.sym_sizes());
  TORCH_CHECK_VALUE(low.sym_sizes() == high.sym_sizes() && (low.dim() == 1 || low.dim() == 2) &&
                        low.sym_size(-1) == batch_min.sym_size(1),
                    "[", function, "] low and high must have shape [", batch_min.sym_size(1), "] or [k, ",
                    batch_min.sym_size(1), "], got ", low.sym_sizes(), " and ", high.sym_sizes());
  for (const auto* tensor : {&batch_max, &batches, &low, &high}) {
    TORCH_CHECK_VALUE(tensor->device() == batch_min.device(), "[", function, "] everything must be on one device, got ",
                      batch_min.device(), " and ", tensor->device());
  }
}

inline void check_mean_range(const char* function, const at::Tensor& batch_min, const at::Tensor& batch_max,
                             std::optional<double> sigma, std::optional<double> quantile) {
  check_batch_ranges(function, batch_min, batch_max);
  TORCH_CHECK_VALUE(sigma.has_value() != quantile.has_value(), "[", function,
                    "] one of sigma and quantile must be set, got ", sigma.has_value() ? "both" : "none");
  TORCH_CHECK_VALUE(!sigma.has_value() || (*sigma > 0.0 && std::isfinite(*sigma)), "[", function,
                    "] sigma must be finite and positive, got ", sigma.value_or(0.0));
  TORCH_CHECK_VALUE(!quantile.has_value() || (*quantile >= 0.0 && *quantile < 0.5), "[", function,
                    "] quantile must be in [0, 0.5), got ", quantile.value_or(0.0));
}

}  // namespace rarefy::ops
