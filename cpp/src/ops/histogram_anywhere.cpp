// Histograms and searches on devices without a kernel of their own (a GPU): values stay there and are counted by torch's
// operators; a histogram is small and goes to the CPU's kernels.
#include <ATen/ops/aminmax.h>
#include <ATen/ops/bincount.h>
#include <ATen/ops/tensor.h>
#include <ATen/ops/where.h>
#include <c10/core/DeviceGuard.h>
#include <rarefy/ops/histogram.h>
#include <rarefy/ops/range_search.h>
#include <torch/library.h>

#include <cmath>
#include <vector>

#include "ops/histogram_checks.h"
#include "ops/histogram_layout.h"
#include "ops/range_search_checks.h"

namespace rarefy::ops {

void histogram_observe_anywhere(const at::Tensor& x, at::Tensor& hist, at::Tensor& hist_min, at::Tensor& hist_max,
                                at::Tensor& skipped, std::optional<int64_t> axis) {
  const int64_t resolved = check_histogram_observe("histogram_observe", x, hist, hist_min, hist_max, skipped, axis);
  const c10::DeviceGuard guard(x.device());
  const auto values = x.detach().to(at::kFloat);
  const auto rows =
      resolved < 0 ? values.reshape({1, -1}) : values.movedim(resolved, 0).reshape({x.size(resolved), -1});
  if (!rows.isfinite().all().item<bool>()) {
    skipped.add_(1);
    return;
  }
  const auto [low, high] = at::aminmax(rows, /*dim=*/1);
  const auto batch_min = low.add(0.0).cpu().contiguous(), batch_max = high.add(0.0).cpu().contiguous();  // without -0
  const int64_t count = rows.size(0), bins = hist.size(1);
  std::vector<double> widths;
  std::vector<int64_t> bases;
  for (int64_t i = 0; i < count; ++i) {
    const auto layout =
        layout_of_range(batch_min.const_data_ptr<float>()[i], batch_max.const_data_ptr<float>()[i], bins);
    widths.push_back(std::ldexp(1.0, layout.exponent));
    bases.push_back(layout.base - i * bins);  // the bins of all rows in one line
  }
  const auto column = [&](const auto& numbers, at::ScalarType type) {
    return at::tensor(numbers, at::TensorOptions().dtype(type)).to(x.device()).unsqueeze(1);
  };
  const auto steps = rows.abs().to(at::kDouble).div(column(widths, at::kDouble)).to(at::kLong);
  const auto places = at::where(rows.lt(0), steps.bitwise_not(), steps);
  const auto flat = places.sub(column(bases, at::kLong)).flatten();
  const auto counts = at::bincount(flat, /*weights=*/{}, count * bins).view({count, bins}).cpu();
  auto new_hist = hist.cpu().clone(), new_min = hist_min.cpu().clone(), new_max = hist_max.cpu().clone();
  histogram_add(new_hist, new_min, new_max, counts, batch_min, batch_max);
  hist.copy_(new_hist);
  hist_min.copy_(new_min);
  hist_max.copy_(new_max);
}

namespace {

std::tuple<at::Tensor, at::Tensor> to_device(std::tuple<at::Tensor, at::Tensor> pair, const at::Tensor& like) {
  return {std::get<0>(pair).to(like.device()), std::get<1>(pair).to(like.device())};
}

void histogram_add_anywhere(at::Tensor& hist, at::Tensor& hist_min, at::Tensor& hist_max, const at::Tensor& other,
                            const at::Tensor& other_min, const at::Tensor& other_max) {
  check_histogram_add("histogram_add", hist, hist_min, hist_max, other, other_min, other_max);
  auto new_hist = hist.cpu().clone(), new_min = hist_min.cpu().clone(), new_max = hist_max.cpu().clone();
  histogram_add(new_hist, new_min, new_max, other.cpu(), other_min.cpu(), other_max.cpu());
  hist.copy_(new_hist);
  hist_min.copy_(new_min);
  hist_max.copy_(new_max);
}

std::tuple<at::Tensor, at::Tensor> choose_range_anywhere(const at::Tensor& hist, const at::Tensor& hist_min,
                                                         const at::Tensor& hist_max, c10::string_view method,
                                                         double parameter, int64_t qmin, int64_t qmax, bool symmetric,
                                                         bool power_of_two) {
  return to_device(choose_range_from_histogram(hist.cpu(), hist_min.cpu(), hist_max.cpu(), std::string(method),
                                               parameter, qmin, qmax, symmetric, power_of_two),
                   hist);
}

std::tuple<at::Tensor, at::Tensor> mse_range_anywhere(const at::Tensor& x, std::optional<int64_t> axis, int64_t qmin,
                                                      int64_t qmax, bool symmetric, double norm, int64_t steps,
                                                      int64_t bins, const std::optional<at::Tensor>& importance,
                                                      bool power_of_two) {
  const auto weights = importance.has_value() ? std::optional(importance->cpu()) : std::nullopt;
  return to_device(mse_range(x.cpu(), axis, qmin, qmax, symmetric, norm, steps, bins, weights, power_of_two), x);
}

std::tuple<at::Tensor, at::Tensor> half_quadratic_anywhere(const at::Tensor& x, std::optional<int64_t> axis,
                                                           int64_t qmin, int64_t qmax, bool symmetric, double norm,
                                                           double beta, double kappa, int64_t iterations) {
  return to_device(half_quadratic_qparams(x.cpu(), axis, qmin, qmax, symmetric, norm, beta, kappa, iterations), x);
}

std::tuple<at::Tensor, at::Tensor> power_of_two_range_anywhere(const at::Tensor& min_val, const at::Tensor& max_val,
                                                               int64_t qmin, int64_t qmax, bool symmetric,
                                                               bool nearest) {
  return to_device(power_of_two_range(min_val.cpu(), max_val.cpu(), qmin, qmax, symmetric, nearest), min_val);
}

void record_ranges_anywhere(at::Tensor& batch_min, at::Tensor& batch_max, at::Tensor& batches, const at::Tensor& low,
                            const at::Tensor& high) {
  check_record_ranges("record_ranges", batch_min, batch_max, batches, low, high);
  auto new_min = batch_min.cpu().clone(), new_max = batch_max.cpu().clone(), new_batches = batches.cpu().clone();
  record_ranges(new_min, new_max, new_batches, low.cpu(), high.cpu());
  batch_min.copy_(new_min);
  batch_max.copy_(new_max);
  batches.copy_(new_batches);
}

std::tuple<at::Tensor, at::Tensor> mean_range_anywhere(const at::Tensor& batch_min, const at::Tensor& batch_max,
                                                       std::optional<double> sigma, std::optional<double> quantile) {
  return to_device(mean_range(batch_min.cpu(), batch_max.cpu(), sigma, quantile), batch_min);
}

}  // namespace

TORCH_LIBRARY_IMPL(rarefy, CUDA, m) {
  m.impl("histogram_observe", &histogram_observe_anywhere);
  m.impl("histogram_add", &histogram_add_anywhere);
  m.impl("choose_range_from_histogram", &choose_range_anywhere);
  m.impl("mse_range", &mse_range_anywhere);
  m.impl("half_quadratic_qparams", &half_quadratic_anywhere);
  m.impl("power_of_two_range", &power_of_two_range_anywhere);
  m.impl("record_ranges", &record_ranges_anywhere);
  m.impl("mean_range", &mean_range_anywhere);
}

}  // namespace rarefy::ops
