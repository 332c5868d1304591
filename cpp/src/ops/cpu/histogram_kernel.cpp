#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <rarefy/ops/histogram.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "ops/cpu/dense.h"
#include "ops/cpu/histogram_search.h"
#include "ops/cpu/row_histogram.h"
#include "ops/histogram_checks.h"

namespace rarefy::ops {
namespace {

void check_state_values(const char* function, const at::Tensor& low, const at::Tensor& high) {
  const float* from = low.const_data_ptr<float>();
  const float* to = high.const_data_ptr<float>();
  constexpr float infinity = std::numeric_limits<float>::infinity();
  for (int64_t i = 0; i < low.numel(); ++i) {
    TORCH_CHECK_VALUE((from[i] == infinity && to[i] == -infinity) ||
                          (std::isfinite(from[i]) && std::isfinite(to[i]) && from[i] <= to[i]),
                      "[", function, "] the range must be finite with min <= max, or (inf, -inf) for none, got (",
                      from[i], ", ", to[i], ") at index ", i);
  }
}

/// Adds to the state row by row, after everything that can fail.
void commit(std::vector<RowHistogram>& rows, const at::Tensor& hist, const at::Tensor& low, const at::Tensor& high) {
  const int64_t bins = hist.size(1);
  auto* counts = hist.data_ptr<int64_t>();
  auto* from = low.data_ptr<float>();
  auto* to = high.data_ptr<float>();
  for (size_t i = 0; i < rows.size(); ++i) {
    rows[i].add(counts + static_cast<int64_t>(i) * bins, from[i], to[i]);
  }
  for (size_t i = 0; i < rows.size(); ++i) {
    if (!rows[i].empty()) {
      std::copy_n(rows[i].counts().data(), bins, counts + static_cast<int64_t>(i) * bins);
      from[i] = rows[i].low();
      to[i] = rows[i].high();
    }
  }
}

void histogram_observe_cpu(const at::Tensor& x, at::Tensor& hist, at::Tensor& hist_min, at::Tensor& hist_max,
                           at::Tensor& skipped, std::optional<int64_t> axis) {
  constexpr const char* function = "histogram_observe";
  const int64_t resolved = check_histogram_observe(function, x, hist, hist_min, hist_max, skipped, axis);
  check_state_values(function, hist_min, hist_max);
  auto rows = row_histograms(x, resolved, hist.size(1));
  if (!rows.has_value()) {
    ++*skipped.data_ptr<int64_t>();
    return;
  }
  commit(*rows, hist, hist_min, hist_max);
}

void histogram_add_cpu(at::Tensor& hist, at::Tensor& hist_min, at::Tensor& hist_max, const at::Tensor& other,
                       const at::Tensor& other_min, const at::Tensor& other_max) {
  constexpr const char* function = "histogram_add";
  check_histogram_add(function, hist, hist_min, hist_max, other, other_min, other_max);
  check_state_values(function, hist_min, hist_max);
  check_state_values(function, other_min, other_max);
  std::vector<RowHistogram> rows;
  for (int64_t i = 0; i < hist.size(0); ++i) {
    rows.emplace_back(hist.size(1))
        .add(other.const_data_ptr<int64_t>() + i * hist.size(1), other_min.const_data_ptr<float>()[i],
             other_max.const_data_ptr<float>()[i]);
  }
  commit(rows, hist, hist_min, hist_max);
}

std::tuple<at::Tensor, at::Tensor> choose_range_cpu(const at::Tensor& hist, const at::Tensor& hist_min,
                                                    const at::Tensor& hist_max, c10::string_view method,
                                                    double parameter, int64_t qmin, int64_t qmax, bool symmetric,
                                                    bool power_of_two) {
  constexpr const char* function = "choose_range_from_histogram";
  const auto chosen =
      check_choose_range(function, hist, hist_min, hist_max, std::string(method), parameter, qmin, qmax, symmetric);
  check_state_values(function, hist_min, hist_max);
  const int64_t bins = hist.size(1);
  const float* from = hist_min.const_data_ptr<float>();
  const float* to = hist_max.const_data_ptr<float>();
  const auto* counts = hist.const_data_ptr<int64_t>();
  for (int64_t i = 0; i < hist.size(0); ++i) {
    const bool valid =
        std::all_of(counts + i * bins, counts + (i + 1) * bins, [](int64_t count) { return count >= 0; });
    TORCH_CHECK_VALUE(valid, "[", function, "] counts must not be negative, got one at index ", i);
  }
  auto low = at::empty({hist.size(0)}, hist_min.options()), high = at::empty_like(low);
  const TargetGrid grid{qmin, qmax, symmetric, power_of_two};
  at::parallel_for(0, hist.size(0), 1, [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) {
      const bool any = std::any_of(counts + i * bins, counts + (i + 1) * bins, [](int64_t count) { return count > 0; });
      if (!any || from[i] > to[i]) {
        low.data_ptr<float>()[i] = std::numeric_limits<float>::infinity();
        high.data_ptr<float>()[i] = -std::numeric_limits<float>::infinity();
        continue;
      }
      const HistogramSearch search(counts + i * bins, bins, from[i], to[i], grid);
      const auto range = search.choose(chosen, parameter);
      low.data_ptr<float>()[i] = range.low;
      high.data_ptr<float>()[i] = range.high;
    }
  });
  return {low, high};
}

}  // namespace

TORCH_LIBRARY_IMPL(rarefy, CPU, m) {
  m.impl("histogram_observe", &histogram_observe_cpu);
  m.impl("histogram_add", &histogram_add_cpu);
  m.impl("choose_range_from_histogram", &choose_range_cpu);
}

}  // namespace rarefy::ops
