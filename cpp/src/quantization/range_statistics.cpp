#include <rarefy/ops/fake_quantize.h>
#include <rarefy/ops/histogram.h>
#include <rarefy/ops/range_search.h>
#include <rarefy/quantization/format_search.h>
#include <rarefy/quantization/range_statistics.h>
#include <torch/types.h>

#include <limits>

namespace rarefy::quantization {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();

struct Ends {
  torch::Tensor low, high;
};

/// One maximum over the processes for both ends: one that has seen nothing gives -inf. Adding 0 turns -0 into 0.
Ends united(const torch::Tensor& low, const torch::Tensor& high, const RangeStatisticsImpl::AllReduce& max) {
  auto packed = torch::cat({-low, high});
  max(packed);
  const int64_t n = low.numel();
  return {-packed.slice(0, 0, n) + 0.0, packed.slice(0, n).contiguous()};
}

/// The range of each row of x, unset where x is not finite, which counts in `skipped`.
Ends ends_of(const torch::Tensor& x, std::optional<int64_t> axis, int64_t rows, torch::Tensor& skipped) {
  const auto options = skipped.options().dtype(torch::kFloat32);
  auto low = torch::full({rows}, kInfinity, options), high = torch::full({rows}, -kInfinity, options);
  auto unused = torch::empty_like(low), unused_too = torch::empty({rows}, options.dtype(torch::kInt32));
  ops::observe(x.detach(), low, high, unused, unused_too, skipped, axis, std::nullopt, 0, 255, false);
  return {low, high};
}

}  // namespace

RangeStatisticsImpl::RangeStatisticsImpl(Observer observer_, int64_t rows)
    : observer(std::move(observer_)), rows_(rows) {
  validate(observer);
  TORCH_CHECK_VALUE(chooses_at_end(observer), "[RangeStatistics] observer must be one that keeps statistics, got ",
                    str(observer));
  TORCH_CHECK_VALUE(rows >= 1, "[RangeStatistics] rows must be at least 1, got ", rows);
  RangeStatisticsImpl::reset();
}

void RangeStatisticsImpl::reset() {
  if (const auto bins = histogram_bins(observer)) {
    hist = register_buffer("hist", torch::zeros({rows_, *bins}, torch::kInt64));
    hist_min = register_buffer("hist_min", torch::full({rows_}, kInfinity));
    hist_max = register_buffer("hist_max", torch::full({rows_}, -kInfinity));
  } else {
    const int64_t most = std::get<MeanNoOutliers>(observer).batches;
    batch_min = register_buffer("batch_min", torch::full({most, rows_}, kInfinity));
    batch_max = register_buffer("batch_max", torch::full({most, rows_}, -kInfinity));
    batches = register_buffer("batches", torch::zeros({3}, torch::kInt64));
  }
}

void RangeStatisticsImpl::observe(const torch::Tensor& x, std::optional<int64_t> axis, torch::Tensor& skipped) {
  if (hist.defined()) {
    ops::histogram_observe(x.detach(), hist, hist_min, hist_max, skipped, axis);
  } else {
    const auto ends = ends_of(x, axis, rows_, skipped);
    ops::record_ranges(batch_min, batch_max, batches, ends.low, ends.high);
  }
}

std::pair<torch::Tensor, torch::Tensor> RangeStatisticsImpl::choose(const Scheme& scheme) const {
  std::tuple<torch::Tensor, torch::Tensor> range;
  if (const auto* mean = std::get_if<MeanNoOutliers>(&observer)) {
    const auto sigma = mean->quantile.has_value() ? std::nullopt : std::optional(mean->sigma.value_or(3.0));
    range = ops::mean_range(batch_min, batch_max, sigma, mean->quantile);
  } else {
    const char* method = "minmax";
    double parameter = 0.0;
    if (const auto* histogram = std::get_if<Histogram>(&observer)) {
      method = histogram->search == RangeSearch::mse ? "mse" : histogram->search == RangeSearch::kl ? "kl" : "minmax";
      parameter = histogram->norm;
    } else if (const auto* tails = std::get_if<Percentile>(&observer)) {
      method = "percentile";
      parameter = tails->percentile;
    } else {
      method = "sqnr";
      parameter = std::get<SQNR>(observer).clip_weight;
    }
    range = scheme_range_from_histogram(hist, hist_min, hist_max, scheme, method, parameter);
  }
  return {std::get<0>(range), std::get<1>(range)};
}

void RangeStatisticsImpl::clear() {
  for (const auto& [name, tensor] : tensors()) {
    const bool is_count = tensor.scalar_type() == torch::kInt64;
    tensor.fill_(is_count ? 0.0 : name == "hist_min" || name == "batch_min" ? kInfinity : -kInfinity);
  }
}

std::map<std::string, torch::Tensor> RangeStatisticsImpl::tensors() const {
  if (hist.defined()) {
    return {{"hist", hist}, {"hist_min", hist_min}, {"hist_max", hist_max}};
  }
  return {{"batch_min", batch_min}, {"batch_max", batch_max}, {"batches", batches}};
}

void RangeStatisticsImpl::add(const std::map<std::string, torch::Tensor>& other) {
  if (hist.defined()) {
    ops::histogram_add(hist, hist_min, hist_max, other.at("hist"), other.at("hist_min"), other.at("hist_max"));
  } else {
    ops::record_ranges(batch_min, batch_max, batches, other.at("batch_min"), other.at("batch_max"));
  }
}

/// The processes agree on the range, move their counts to its bins, and add them up.
void RangeStatisticsImpl::add_over_processes(const torch::Tensor& counts, const torch::Tensor& low,
                                             const torch::Tensor& high, const AllReduce& sum) {
  const auto own = counts.clone();
  auto total = torch::zeros_like(hist), from = low, to = high;
  ops::histogram_add(total, from, to, own, hist_min, hist_max);
  sum(total);
  hist.copy_(total);
  hist_min.copy_(low);
  hist_max.copy_(high);
}

void RangeStatisticsImpl::observe_over_processes(const torch::Tensor& x, std::optional<int64_t> axis,
                                                 torch::Tensor& skipped, const AllReduce& max, const AllReduce& sum) {
  auto bad = torch::zeros_like(skipped);
  if (hist.defined()) {
    RangeStatisticsImpl batch(observer, rows_);
    batch.to(hist.device());
    batch.observe(x, axis, bad);
    const auto ends = united(batch.hist_min, batch.hist_max, max);
    batch.add_over_processes(batch.hist, ends.low, ends.high, sum);
    add(batch.tensors());
  } else {
    const auto own = ends_of(x, axis, rows_, bad);
    const auto ends = united(own.low, own.high, max);
    ops::record_ranges(batch_min, batch_max, batches, ends.low, ends.high);
  }
  auto count = bad.to(torch::kFloat32);
  max(count);
  skipped.add_(count.to(torch::kInt64));
}

void RangeStatisticsImpl::merge_over_processes(const AllReduce& max, const AllReduce& sum, const AllGather& gather) {
  if (hist.defined()) {
    const auto ends = united(hist_min, hist_max, max);
    add_over_processes(hist, ends.low, ends.high, sum);
    return;
  }
  const auto lows = gather(batch_min), highs = gather(batch_max);
  clear();
  for (size_t i = 0; i < lows.size(); ++i) {
    ops::record_ranges(batch_min, batch_max, batches, lows[i], highs[i]);
  }
}

}  // namespace rarefy::quantization
