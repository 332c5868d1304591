#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/isfinite.h>
#include <rarefy/ops/range_search.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "ops/cpu/dense.h"
#include "ops/cpu/histogram_search.h"
#include "ops/cpu/range_search_simd.h"
#include "ops/cpu/row_histogram.h"
#include "ops/narrowing.h"
#include "ops/range_search_checks.h"

namespace rarefy::ops {
namespace {

/// The range of each row; throws for one that is not finite.
std::vector<ValueRange> ranges_of(const char* function, const at::Tensor& rows) {
  const int64_t count = rows.size(0), n = rows.size(1);
  const auto layout = layout_of(rows, -1);
  const float infinity = std::numeric_limits<float>::infinity();
  std::vector<ValueRange> ranges(static_cast<size_t>(count), {infinity, -infinity});
  std::vector<char> finite(static_cast<size_t>(count), 1);
  at::parallel_for(0, count, std::max<int64_t>(1, kGrain / n), [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) {
      auto& range = ranges[static_cast<size_t>(i)];
      const auto bytes = static_cast<size_t>(i * n) * static_cast<size_t>(rows.element_size());
      const bool good = RAREFY_ISA_CALL(min_max, static_cast<const char*>(rows.const_data_ptr()) + bytes,
                                        cpu::Layout{layout.type, 1, n}, &range.low, &range.high, 0, n);
      finite[static_cast<size_t>(i)] = good ? 1 : 0;
    }
  });
  for (size_t i = 0; i < finite.size(); ++i) {
    TORCH_CHECK_VALUE(finite[i] != 0, "[", function, "] input must be finite, got NaN or infinite values in row ", i);
  }
  return ranges;
}

cpu::StepGrid step_grid(const QParams& parameters, const TargetGrid& grid) {
  return {parameters.scale, static_cast<float>(grid.qmin - parameters.zero_point),
          static_cast<float>(grid.qmax - parameters.zero_point)};
}

/// At least the distance, in steps, of any value in the range from the grid.
float farthest(ValueRange range, const cpu::StepGrid& grid) {
  const double reach = std::max(std::fabs(range.low), std::fabs(range.high));
  const double steps = reach / static_cast<double>(grid.scale) + std::fabs(grid.first) + std::fabs(grid.last) + 1.0;
  return static_cast<float>(std::min(steps, 1e30));
}

/// The sum of importance * |x - x_hat|^norm over one row, or a part of the sum that is above the limit.
class RowError {
 public:
  RowError(const float* x, const float* importance, int64_t n, ValueRange range, double norm, const TargetGrid& grid)
      : x_(x), importance_(importance), n_(n), range_(range), norm_(norm), grid_(grid) {}

  double operator()(const QParams& parameters, double limit) const {
    const auto grid = step_grid(parameters, grid_);
    return RAREFY_ISA_CALL(grid_error, x_, importance_, n_, grid, norm_, farthest(range_, grid),
                           std::pow(static_cast<double>(parameters.scale), norm_), limit);
  }

 private:
  const float* x_;
  const float* importance_;
  int64_t n_;
  ValueRange range_;
  double norm_;
  TargetGrid grid_;
};

std::tuple<at::Tensor, at::Tensor> mse_range_cpu(const at::Tensor& x, std::optional<int64_t> axis, int64_t qmin,
                                                 int64_t qmax, bool symmetric, double norm, int64_t steps, int64_t bins,
                                                 const std::optional<at::Tensor>& importance, bool power_of_two) {
  constexpr const char* function = "mse_range";
  const int64_t resolved = check_mse_range(function, x, axis, qmin, qmax, symmetric, norm, steps, bins, importance);
  constexpr int64_t kValuesPerBin = 16;
  const TargetGrid grid{qmin, qmax, symmetric, power_of_two};
  const int64_t count = resolved < 0 ? 1 : x.size(resolved), n = x.numel() / count;
  auto low = at::empty({count}, x.options().dtype(at::kFloat)), high = at::empty_like(low);
  const auto store = [&](int64_t row, ValueRange range) {
    low.data_ptr<float>()[row] = range.low;
    high.data_ptr<float>()[row] = range.high;
  };
  if (bins > 0 && !importance.has_value() && n >= kValuesPerBin * bins) {
    const bool finite = for_each_row_histogram(x, resolved, bins, [&](int64_t i, RowHistogram& row) {
      store(i, HistogramSearch(row.counts().data(), bins, row.low(), row.high(), grid).least_error(norm, steps));
    });
    TORCH_CHECK_VALUE(finite, "[", function, "] input must be finite, got NaN or infinite values");
    return {low, high};
  }
  // Beside an importance the values of a row must lie in the order of the axes.
  auto rows = value_rows(importance.has_value() ? x.contiguous() : x, resolved);
  at::Tensor weights;
  if (importance.has_value()) {
    weights = value_rows(importance->to(at::kFloat).expand_as(x).contiguous(), resolved);
    TORCH_CHECK_VALUE(weights.ge(0).logical_and(at::isfinite(weights)).all().item<bool>(), "[", function,
                      "] importance must be finite and not negative, but is not");
  }
  const auto ranges = ranges_of(function, rows);
  rows = rows.to(at::kFloat);
  at::parallel_for(0, count, 1, [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) {
      const auto range = ranges[static_cast<size_t>(i)];
      const RowError error(rows.const_data_ptr<float>() + i * n,
                           weights.defined() ? weights.const_data_ptr<float>() + i * n : nullptr, n, range, norm, grid);
      store(i, Narrowing(range, grid, error).search(steps));
    }
  });
  return {low, high};
}

// --- Half-quadratic splitting -------------------------------------------------------------------------------------------

struct Splitting {
  double norm, beta, kappa;
  int64_t iterations;
};

QParams split_row(const float* x, int64_t n, ValueRange range, const TargetGrid& grid, const Splitting& options) {
  const RowError error(x, nullptr, n, range, options.norm, grid);
  QParams best = grid.parameters(range);
  double best_error = error(best, std::numeric_limits<double>::infinity()), beta = options.beta;
  auto scale = static_cast<double>(best.scale);
  auto zero_point = static_cast<double>(best.zero_point);
  const double largest = kLargestGridValue / static_cast<double>(grid.qmax - grid.qmin);
  for (int64_t i = 0; i < options.iterations && best_error > 0.0; ++i, beta *= options.kappa) {
    const auto s = static_cast<float>(scale);
    const cpu::StepGrid reach{s, static_cast<float>(static_cast<double>(grid.qmin) - zero_point),
                              static_cast<float>(static_cast<double>(grid.qmax) - zero_point)};
    cpu::SplittingSums sums;
    RAREFY_ISA_CALL(splitting_sums, x, n, s, static_cast<float>(zero_point), static_cast<float>(grid.qmin),
                    static_cast<float>(grid.qmax), static_cast<float>(options.norm), static_cast<float>(beta),
                    farthest(range, reach), &sums);
    const auto count = static_cast<double>(n);
    if (!grid.symmetric) {
      zero_point =
          std::clamp((sums.q - sums.t) / count, static_cast<double>(grid.qmin), static_cast<double>(grid.qmax));
    }
    const double square = sums.qq - 2.0 * zero_point * sums.q + count * zero_point * zero_point;
    const double product = sums.tq - zero_point * sums.t;
    if (!(square > 0.0) || !(product > 0.0)) {
      break;  // every value is 0 on the grid
    }
    scale = std::clamp(scale * product / square, static_cast<double>(kSmallestScale), largest);
    const QParams candidate{static_cast<float>(scale), static_cast<int32_t>(std::rint(zero_point))};
    const double candidate_error = error(candidate, best_error);
    if (!(candidate_error < best_error)) {
      break;
    }
    best = candidate;
    best_error = candidate_error;
  }
  return best;
}

std::tuple<at::Tensor, at::Tensor> half_quadratic_cpu(const at::Tensor& x, std::optional<int64_t> axis, int64_t qmin,
                                                      int64_t qmax, bool symmetric, double norm, double beta,
                                                      double kappa, int64_t iterations) {
  constexpr const char* function = "half_quadratic_qparams";
  const int64_t resolved =
      check_half_quadratic(function, x, axis, qmin, qmax, symmetric, norm, beta, kappa, iterations);
  auto rows = value_rows(x, resolved);
  const int64_t count = rows.size(0), n = rows.size(1);
  const auto ranges = ranges_of(function, rows);
  rows = rows.to(at::kFloat);
  auto scale = at::empty({count}, rows.options());
  auto zero_point = at::empty({count}, rows.options().dtype(at::kInt));
  const TargetGrid grid{qmin, qmax, symmetric, false};
  at::parallel_for(0, count, 1, [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) {
      const auto parameters = split_row(rows.const_data_ptr<float>() + i * n, n, ranges[static_cast<size_t>(i)], grid,
                                        {norm, beta, kappa, iterations});
      scale.data_ptr<float>()[i] = parameters.scale;
      zero_point.data_ptr<int32_t>()[i] = parameters.zero_point;
    }
  });
  return {scale, zero_point};
}

// --- Powers of two ------------------------------------------------------------------------------------------------------

std::tuple<at::Tensor, at::Tensor> power_of_two_range_cpu(const at::Tensor& min_val, const at::Tensor& max_val,
                                                          int64_t qmin, int64_t qmax, bool symmetric, bool nearest) {
  constexpr const char* function = "power_of_two_range";
  check_choose_qparams(function, min_val, max_val, qmin, qmax, symmetric);
  const auto low = min_val.to(at::kFloat).contiguous(), high = max_val.to(at::kFloat).contiguous();
  auto new_low = at::empty(low.sizes(), low.options()), new_high = at::empty_like(new_low);
  for (int64_t i = 0; i < low.numel(); ++i) {
    const ValueRange range{low.const_data_ptr<float>()[i], high.const_data_ptr<float>()[i]};
    TORCH_CHECK_VALUE(std::isfinite(range.low) && std::isfinite(range.high) && range.low <= range.high, "[", function,
                      "] the range must be finite with min <= max, got [", range.low, ", ", range.high, "] at index ",
                      i);
    const auto result = rarefy::power_of_two_range(range, qmin, qmax, symmetric, nearest);
    new_low.data_ptr<float>()[i] = result.low;
    new_high.data_ptr<float>()[i] = result.high;
  }
  return {new_low, new_high};
}

}  // namespace

TORCH_LIBRARY_IMPL(rarefy, CPU, m) {
  m.impl("mse_range", &mse_range_cpu);
  m.impl("half_quadratic_qparams", &half_quadratic_cpu);
  m.impl("power_of_two_range", &power_of_two_range_cpu);
}

}  // namespace rarefy::ops
