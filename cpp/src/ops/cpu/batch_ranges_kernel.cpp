// The ranges of batches, and their mean without outliers: a handful of numbers.
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <rarefy/ops/range_search.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "ops/range_search_checks.h"

namespace rarefy::ops {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();

/// Keeps every second of the first `kept` rows.
void thin(float* rows, int64_t kept, int64_t channels, float unset) {
  for (int64_t i = 1; 2 * i < kept; ++i) {
    std::copy_n(rows + 2 * i * channels, channels, rows + i * channels);
  }
  std::fill(rows + (kept + 1) / 2 * channels, rows + kept * channels, unset);
}

void record_ranges_cpu(at::Tensor& batch_min, at::Tensor& batch_max, at::Tensor& batches, const at::Tensor& low,
                       const at::Tensor& high) {
  constexpr const char* function = "record_ranges";
  check_record_ranges(function, batch_min, batch_max, batches, low, high);
  const int64_t capacity = batch_min.size(0), channels = batch_min.size(1);
  auto* state = batches.data_ptr<int64_t>();
  int64_t &seen = state[0], &kept = state[1], &every = state[2];
  TORCH_CHECK_VALUE(kept >= 0 && kept <= capacity && seen >= kept && (every >= 1 || seen == 0), "[", function,
                    "] batches must say how many were seen, kept and that every i-th was, got ", seen, ", ", kept, ", ",
                    every);
  every = std::max<int64_t>(every, 1);
  const auto from = low.contiguous(), to = high.contiguous();
  auto *lows = batch_min.data_ptr<float>(), *highs = batch_max.data_ptr<float>();
  const auto is_finite = [](float value) { return std::isfinite(value); };
  for (int64_t row = 0; row < (low.dim() == 1 ? 1 : low.size(0)); ++row) {
    const float* a = from.const_data_ptr<float>() + row * channels;
    const float* b = to.const_data_ptr<float>() + row * channels;
    if (!std::all_of(a, a + channels, is_finite) || !std::all_of(b, b + channels, is_finite)) {
      continue;
    }
    if (seen++ % every != 0) {
      continue;
    }
    if (kept == capacity) {
      thin(lows, kept, channels, kInfinity);
      thin(highs, kept, channels, -kInfinity);
      kept /= 2;
      every *= 2;
      if ((seen - 1) % every != 0) {
        continue;
      }
    }
    std::copy_n(a, channels, lows + kept * channels);
    std::copy_n(b, channels, highs + kept * channels);
    ++kept;
  }
}

double quantile_of(const std::vector<double>& sorted, double q) {
  const double rank = q * static_cast<double>(sorted.size() - 1);
  const auto below = static_cast<size_t>(rank);
  const size_t above = std::min(below + 1, sorted.size() - 1);
  return sorted[below] + (rank - static_cast<double>(below)) * (sorted[above] - sorted[below]);
}

double mean_of(const std::vector<double>& values, double low, double high) {
  double sum = 0.0, kept = 0.0;
  for (const double value : values) {
    if (value >= low && value <= high) {
      sum += value;
      kept += 1.0;
    }
  }
  // None: the bounds lie between two values, or rounding moved them. Then nobody is an outlier.
  return kept == 0.0 ? mean_of(values, -kInfinity, kInfinity) : sum / kept;
}

/// Of values that are not empty.
double mean_without_outliers(std::vector<double> values, std::optional<double> sigma, std::optional<double> quantile) {
  std::sort(values.begin(), values.end());
  if (quantile.has_value()) {
    return mean_of(values, quantile_of(values, *quantile), quantile_of(values, 1.0 - *quantile));
  }
  const auto n = static_cast<double>(values.size());
  const double mean = mean_of(values, -kInfinity, kInfinity);
  double square = 0.0;
  for (const double value : values) {
    square += (value - mean) * (value - mean) / n;
  }
  const double reach = *sigma * std::sqrt(square);
  return mean_of(values, mean - reach, mean + reach);
}

std::tuple<at::Tensor, at::Tensor> mean_range_cpu(const at::Tensor& batch_min, const at::Tensor& batch_max,
                                                  std::optional<double> sigma, std::optional<double> quantile) {
  check_mean_range("mean_range", batch_min, batch_max, sigma, quantile);
  const int64_t n = batch_min.size(0), channels = batch_min.size(1);
  auto low = at::empty({channels}, batch_min.options()), high = at::empty_like(low);
  for (const auto& [batches, result, unset] :
       {std::tuple{&batch_min, &low, kInfinity}, std::tuple{&batch_max, &high, -kInfinity}}) {
    for (int64_t c = 0; c < channels; ++c) {
      std::vector<double> column;
      for (int64_t i = 0; i < n; ++i) {
        const float value = batches->const_data_ptr<float>()[i * channels + c];
        if (value != unset) {
          column.push_back(value);
        }
      }
      result->data_ptr<float>()[c] =
          column.empty() ? unset : static_cast<float>(mean_without_outliers(column, sigma, quantile));
    }
  }
  return {low, high};
}

}  // namespace

TORCH_LIBRARY_IMPL(rarefy, CPU, m) {
  m.impl("record_ranges", &record_ranges_cpu);
  m.impl("mean_range", &mean_range_cpu);
}

}  // namespace rarefy::ops
