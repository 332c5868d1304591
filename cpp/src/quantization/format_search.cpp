#include <ATen/ops/cat.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/full.h>
#include <ATen/ops/isfinite.h>
#include <ATen/ops/maximum.h>
#include <ATen/ops/minimum.h>
#include <ATen/ops/tensor.h>
#include <ATen/ops/zeros.h>
#include <ATen/ops/zeros_like.h>
#include <c10/core/SymInt.h>
#include <fmt/format.h>
#include <rarefy/ops/fake_quantize.h>
#include <rarefy/ops/formats.h>
#include <rarefy/ops/histogram.h>
#include <rarefy/ops/range_search.h>
#include <rarefy/quantization/format_search.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "ops/block_views.h"
#include "ops/histogram_layout.h"
#include "quantization/cast_error.h"
#include "quantization/scheme_cache.h"

namespace rarefy::quantization {
namespace {

constexpr int64_t kSteps = 128;                 // of the search on a histogram, as for integers
constexpr int64_t kPointsPerBin = 4;            // at which the error of a cast is measured
constexpr int64_t kValuesPerBin = 16;           // more than so many: the values' histogram stands for them
constexpr int64_t kInCache = int64_t{1} << 16;  // values that all candidates are tried on, one after the other
constexpr int64_t kScales = int64_t{1} << 20;   // at a time, where each row has all its candidates tried at once

bool gathers(const Observer& observer) { return chooses_at_end(observer); }

/// The range that ends at -end and end, or at the last value before.
std::pair<at::Tensor, at::Tensor> ends_to_range(const at::Tensor& end, const at::Tensor& low, const at::Tensor& high) {
  return {at::maximum(-end, low.clamp_max(0.0)), at::minimum(end, high.clamp_min(0.0))};
}

FoundScales search_minifloat(const at::Tensor& rows, const at::Tensor& weights, const Minifloat& format,
                             bool power_of_two, const MSE& mse) {
  const int64_t n = rows.size(1);
  const CastError error(format, power_of_two, mse.norm, 1.0);
  const auto low = rows.amin(1).to(at::kFloat), high = rows.amax(1).to(at::kFloat);
  at::Tensor ends;
  if (mse.bins > 0 && !weights.defined() && n >= kValuesPerBin * mse.bins) {
    auto hist = at::zeros({rows.size(0), mse.bins}, rows.options().dtype(at::kLong));
    auto hist_min = at::full({rows.size(0)}, std::numeric_limits<float>::infinity(), low.options());
    auto hist_max = -hist_min, skipped = at::zeros({1}, hist.options());
    ops::histogram_observe(rows, hist, hist_min, hist_max, skipped, 0);
    Scheme scheme = Scheme::minifloat(format);
    scheme.power_of_two = power_of_two;
    const auto [from, to] = scheme_range_from_histogram(hist, hist_min, hist_max, scheme, "mse", mse.norm);
    ends = at::maximum(-from, to);
  } else {
    const int64_t height = std::max<int64_t>(1, error.is_fused(rows, weights) ? kScales / mse.steps : kInCache / n);
    std::vector<at::Tensor> found;
    for (int64_t first = 0; first < rows.size(0); first += height) {
      const int64_t count = std::min(height, rows.size(0) - first);
      found.push_back(best_ends(rows.narrow(0, first, count),
                                weights.defined() ? weights.narrow(0, first, count) : weights, error, mse.steps));
    }
    ends = at::cat(found);
  }
  const auto scale = error.scale(ends);
  const auto [from, to] = ends_to_range(ends, low, high);
  return {scale, at::zeros_like(scale, scale.options().dtype(at::kInt)), from, to};
}

FoundScales search_integer(const at::Tensor& rows, const at::Tensor& weights, const Scheme& scheme,
                           const Observer& observer) {
  const auto qmin = scheme.qmin(), qmax = scheme.qmax();
  if (const auto* mse = std::get_if<MSE>(&observer)) {
    const auto [low, high] =
        ops::mse_range(rows, 0, qmin, qmax, scheme.symmetric, mse->norm, mse->steps, mse->bins,
                       weights.defined() ? std::optional(weights) : std::nullopt, scheme.power_of_two);
    const auto [scale, zero_point] = ops::choose_qparams(low, high, qmin, qmax, scheme.symmetric);
    return {scale, zero_point, low, high};
  }
  const auto& hq = std::get<HalfQuadratic>(observer);
  const auto [scale, zero_point] =
      ops::half_quadratic_qparams(rows, 0, qmin, qmax, scheme.symmetric, hq.norm, hq.beta, hq.kappa, hq.iterations);
  return {scale, zero_point, (qmin - zero_point) * scale, (qmax - zero_point) * scale};
}

/// Blocks that do not fill their axis go by themselves, so that no search sees a value that is not there.
FoundScales search_blocks(const at::Tensor& x, const at::Tensor& importance, const ops::Sharing& sharing,
                          const Scheme& scheme, const Observer& observer) {
  for (size_t i = 0; i < sharing.block.size(); ++i) {
    const int64_t axis = sharing.axis - static_cast<int64_t>(sharing.block.size() - 1 - i), length = x.size(axis);
    const int64_t size = sharing.block[i].expect_int();
    const int64_t whole = length / size * size;
    if (whole == length) {
      continue;
    }
    const auto part = [&](int64_t start, int64_t count) {
      auto own = sharing;
      own.block[i] = std::min(size, count);
      return search_blocks(x.narrow(axis, start, count),
                           importance.defined() ? importance.narrow(axis, start, count) : importance, own, scheme,
                           observer);
    };
    const auto last = part(whole, length - whole);
    if (whole == 0) {
      return last;
    }
    const auto first = part(0, whole);
    return {at::cat({first.scale, last.scale}, axis), at::cat({first.zero_point, last.zero_point}, axis),
            at::cat({first.low, last.low}, axis), at::cat({first.high, last.high}, axis)};
  }
  const auto rows = ops::to_blocks(x, sharing, 0.0);
  const auto weights = importance.defined() ? ops::to_blocks(importance, sharing, 0.0) : at::Tensor();
  const auto* minifloat = std::get_if<Minifloat>(&scheme.format);
  auto found = minifloat != nullptr ? search_minifloat(rows.to(at::kFloat), weights, *minifloat, scheme.power_of_two,
                                                       std::get<MSE>(observer))
                                    : search_integer(rows, weights, scheme, observer);
  const auto sizes = ops::scale_sizes(x, sharing);
  for (auto* tensor : {&found.scale, &found.zero_point, &found.low, &found.high}) {
    *tensor = tensor->reshape_symint(sizes);
  }
  return found;
}

Observer observer_of(const std::string& method, const std::vector<double>& p) {
  TORCH_CHECK_VALUE((method == "mse" && p.size() == 3) || (method == "half_quadratic" && p.size() == 4),
                    "[search_scheme] method must be 'mse' with 3 parameters or 'half_quadratic' with 4, got '", method,
                    "' with ", p.size());
  if (method == "mse") {
    return MSE{p[0], static_cast<int64_t>(p[1]), static_cast<int64_t>(p[2])};
  }
  return HalfQuadratic{p[0], p[1], p[2], static_cast<int64_t>(p[3])};
}

using FourTensors = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor>;

FourTensors search_scheme_op(const at::Tensor& x, std::string json, std::string method, std::vector<double> parameters,
                             const std::optional<at::Tensor>& importance) {
  auto found = search_scheme(x, scheme_of(json), observer_of(method, parameters), importance);
  return {found.scale, found.zero_point, found.low, found.high};
}

FourTensors search_scheme_meta(const at::Tensor& x, std::string json, std::string method,
                               std::vector<double> parameters, const std::optional<at::Tensor>&) {
  observer_of(method, parameters);
  const auto& scheme = scheme_of(json);
  const auto block = scheme.block();
  const std::vector<c10::SymInt> sizes_of_block(block.begin(), block.end());
  const auto sharing = ops::check_sharing("search_scheme", x, scheme.block_axis(), sizes_of_block);
  const auto scale = at::empty_symint(ops::scale_sizes(x, sharing), x.options().dtype(at::kFloat));
  return {scale, at::empty_like(scale, scale.options().dtype(at::kInt)), at::empty_like(scale), at::empty_like(scale)};
}

std::tuple<at::Tensor, at::Tensor> range_op(const at::Tensor& hist, const at::Tensor& hist_min,
                                            const at::Tensor& hist_max, std::string json, std::string method,
                                            double parameter) {
  const auto [low, high] = scheme_range_from_histogram(hist, hist_min, hist_max, scheme_of(json), method, parameter);
  return {low, high};
}

std::tuple<at::Tensor, at::Tensor> range_meta(const at::Tensor&, const at::Tensor& hist_min, const at::Tensor& hist_max,
                                              std::string, std::string, double) {
  return {at::empty_like(hist_min), at::empty_like(hist_max)};
}

}  // namespace

std::optional<std::string> why_not_observed(const Scheme& scheme, const Observer& observer) {
  if (scheme.is_plain() || follows_a_range(observer)) {
    return std::nullopt;
  }
  if (!scheme.needs_range()) {
    return scheme.dynamic ? "its scales are those of the very tensor that is rounded" : "k-means chooses its values";
  }
  const bool by_block = !scheme.block().empty();
  if (gathers(observer) && by_block) {
    return "statistics over batches are of the tensor or its channels";
  }
  if (scheme.is_integer()) {
    return std::holds_alternative<HalfQuadratic>(observer) && scheme.power_of_two
               ? std::optional<std::string>("half-quadratic splitting finds scales that are no powers of two")
               : std::nullopt;
  }
  if (std::holds_alternative<HalfQuadratic>(observer)) {
    return "half-quadratic splitting is of integers";
  }
  const auto* histogram = std::get_if<Histogram>(&observer);
  return histogram != nullptr && histogram->search == RangeSearch::kl
             ? std::optional<std::string>("the divergence (kl) is of integers")
             : std::nullopt;
}

FoundScales search_scheme(const at::Tensor& x, const Scheme& scheme, const Observer& observer,
                          const std::optional<at::Tensor>& importance) {
  const auto* function = "search_scheme";
  validate(observer);
  const bool is_mse = std::holds_alternative<MSE>(observer);
  TORCH_CHECK_VALUE(is_mse || std::holds_alternative<HalfQuadratic>(observer), "[", function,
                    "] observer must be one that searches (MSE, HalfQuadratic), got ", str(observer));
  TORCH_CHECK_VALUE(scheme.needs_range() && !why_not_observed(scheme, observer).has_value(), "[", function, "] ",
                    str(observer), " does not serve ", scheme.str(), ": ",
                    why_not_observed(scheme, observer).value_or("it has no scales"));
  TORCH_CHECK_VALUE(is_mse || !importance.has_value(), "[", function, "] importance is for MSE, got it with ",
                    str(observer));
  const auto block = scheme.block();
  const std::vector<c10::SymInt> sizes_of_block(block.begin(), block.end());
  const auto sharing = ops::check_sharing(function, x, scheme.block_axis(), sizes_of_block);
  TORCH_CHECK_VALUE(x.numel() != 0, "[", function, "] input must not be empty, got shape ", x.sizes());
  TORCH_CHECK_VALUE(at::isfinite(x).all().item<bool>(), "[", function, "] input must be finite, but is not");
  at::Tensor weights;
  if (importance.has_value()) {
    ops::check_float(function, *importance, "importance");
    bool broadcasts = importance->dim() <= x.dim();
    for (int64_t i = 1; broadcasts && i <= importance->dim(); ++i) {
      broadcasts = importance->size(-i) == 1 || importance->size(-i) == x.size(-i);
    }
    TORCH_CHECK_VALUE(broadcasts, "[", function, "] importance must broadcast to the input's shape ", x.sizes(),
                      ", got ", importance->sizes());
    weights = importance->to(at::kFloat);
    TORCH_CHECK_VALUE(weights.ge(0).logical_and(at::isfinite(weights)).all().item<bool>(), "[", function,
                      "] importance must be finite and not negative, but is not");
    weights = weights.expand_as(x);
  }
  return search_blocks(x, weights, sharing, scheme, observer);
}

std::pair<at::Tensor, at::Tensor> scheme_range_from_histogram(const at::Tensor& hist, const at::Tensor& hist_min,
                                                              const at::Tensor& hist_max, const Scheme& scheme,
                                                              const std::string& method, double parameter) {
  const auto* minifloat = std::get_if<Minifloat>(&scheme.format);
  const bool casts = minifloat != nullptr && (method == "mse" || method == "sqnr");
  TORCH_CHECK_VALUE(minifloat == nullptr || method != "kl",
                    "[scheme_range_from_histogram] the divergence (kl) is of integers, got ", scheme.str());
  const auto [qmin, qmax] = scheme.observed_range();
  // Checks the histograms too. Without a search for integers; the errors of minifloats are measured below.
  const auto [seen_low, seen_high] =
      ops::choose_range_from_histogram(hist, hist_min, hist_max, casts ? "minmax" : method, casts ? 0.0 : parameter,
                                       qmin, qmax, scheme.symmetric, scheme.is_integer() && scheme.power_of_two);
  if (!casts) {
    return {seen_low, seen_high};
  }
  const CastError error(*minifloat, scheme.power_of_two, method == "mse" ? parameter : 2.0,
                        method == "mse" ? 1.0 : parameter);
  const auto counts = hist.cpu(), low = seen_low.cpu(), high = seen_high.cpu();
  auto from = low.clone(), to = high.clone();
  const int64_t bins = counts.size(1);
  for (int64_t row = 0; row < counts.size(0); ++row) {
    const float first = low.const_data_ptr<float>()[row], last = high.const_data_ptr<float>()[row];
    if (first > last) {
      continue;  // nothing was seen
    }
    const auto layout = layout_of_range(first, last, bins);
    std::vector<float> points, weights;
    for (int64_t i = 0; i < bins; ++i) {
      const int64_t count = counts.const_data_ptr<int64_t>()[row * bins + i];
      for (int64_t part = 0; count != 0 && part < kPointsPerBin; ++part) {
        const double place = static_cast<double>(layout.base + i) +
                             (static_cast<double>(part) + 0.5) / static_cast<double>(kPointsPerBin);
        const double value = std::ldexp(place, layout.exponent);
        points.push_back(static_cast<float>(std::clamp(value, static_cast<double>(first), static_cast<double>(last))));
        weights.push_back(static_cast<float>(static_cast<double>(count) / static_cast<double>(kPointsPerBin)));
      }
    }
    // The ends themselves, without weight: the widest range is that of the values.
    for (const float end : {first, last}) {
      points.push_back(end);
      weights.push_back(0.0f);
    }
    const auto end = best_ends(at::tensor(points).unsqueeze(0), at::tensor(weights).unsqueeze(0), error, kSteps);
    const auto [new_low, new_high] = ends_to_range(end, low.slice(0, row, row + 1), high.slice(0, row, row + 1));
    from.slice(0, row, row + 1).copy_(new_low);
    to.slice(0, row, row + 1).copy_(new_high);
  }
  return {from.to(hist.device()), to.to(hist.device())};
}

TORCH_LIBRARY_FRAGMENT(rarefy, m) {
  m.def(
      "search_scheme(Tensor x, str scheme, str method, float[] parameters, Tensor? importance=None) -> "
      "(Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "scheme_range_from_histogram(Tensor hist, Tensor hist_min, Tensor hist_max, str scheme, str method, "
      "float parameter) -> (Tensor, Tensor)");
}

TORCH_LIBRARY_IMPL(rarefy, CompositeExplicitAutograd, m) {
  m.impl("search_scheme", &search_scheme_op);
  m.impl("scheme_range_from_histogram", &range_op);
}

TORCH_LIBRARY_IMPL(rarefy, Meta, m) {
  m.impl("search_scheme", &search_scheme_meta);
  m.impl("scheme_range_from_histogram", &range_meta);
}

}  // namespace rarefy::quantization
