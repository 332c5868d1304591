#include <ATen/ops/empty.h>
#include <rarefy/ops/range_search.h>
#include <torch/library.h>

#include "ops/range_search_checks.h"

namespace rarefy::ops {
namespace {

at::Tensor per_row(const at::Tensor& x, int64_t axis, at::ScalarType type) {
  return at::empty_symint({axis < 0 ? c10::SymInt(1) : x.sym_size(axis)}, x.options().dtype(type));
}

std::tuple<at::Tensor, at::Tensor> mse_range_meta(const at::Tensor& x, std::optional<int64_t> axis, int64_t qmin,
                                                  int64_t qmax, bool symmetric, double norm, int64_t steps,
                                                  int64_t bins, const std::optional<at::Tensor>& importance,
                                                  bool /*power_of_two*/) {
  const int64_t resolved = check_mse_range("mse_range", x, axis, qmin, qmax, symmetric, norm, steps, bins, importance);
  return {per_row(x, resolved, at::kFloat), per_row(x, resolved, at::kFloat)};
}

std::tuple<at::Tensor, at::Tensor> half_quadratic_meta(const at::Tensor& x, std::optional<int64_t> axis, int64_t qmin,
                                                       int64_t qmax, bool symmetric, double norm, double beta,
                                                       double kappa, int64_t iterations) {
  const int64_t resolved =
      check_half_quadratic("half_quadratic_qparams", x, axis, qmin, qmax, symmetric, norm, beta, kappa, iterations);
  return {per_row(x, resolved, at::kFloat), per_row(x, resolved, at::kInt)};
}

std::tuple<at::Tensor, at::Tensor> power_of_two_range_meta(const at::Tensor& min_val, const at::Tensor& max_val,
                                                           int64_t qmin, int64_t qmax, bool symmetric,
                                                           bool /*nearest*/) {
  check_choose_qparams("power_of_two_range", min_val, max_val, qmin, qmax, symmetric);
  return {at::empty_symint(min_val.sym_sizes(), min_val.options().dtype(at::kFloat)),
          at::empty_symint(min_val.sym_sizes(), min_val.options().dtype(at::kFloat))};
}

void record_ranges_meta(at::Tensor& batch_min, at::Tensor& batch_max, at::Tensor& batches, const at::Tensor& low,
                        const at::Tensor& high) {
  check_record_ranges("record_ranges", batch_min, batch_max, batches, low, high);
}

std::tuple<at::Tensor, at::Tensor> mean_range_meta(const at::Tensor& batch_min, const at::Tensor& batch_max,
                                                   std::optional<double> sigma, std::optional<double> quantile) {
  check_mean_range("mean_range", batch_min, batch_max, sigma, quantile);
  return {at::empty_symint({batch_min.sym_size(1)}, batch_min.options()),
          at::empty_symint({batch_min.sym_size(1)}, batch_min.options())};
}

}  // namespace

TORCH_LIBRARY_IMPL(rarefy, Meta, m) {
  m.impl("mse_range", &mse_range_meta);
  m.impl("half_quadratic_qparams", &half_quadratic_meta);
  m.impl("power_of_two_range", &power_of_two_range_meta);
  m.impl("record_ranges", &record_ranges_meta);
  m.impl("mean_range", &mean_range_meta);
}

}  // namespace rarefy::ops
