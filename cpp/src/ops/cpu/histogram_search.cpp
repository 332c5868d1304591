#include "ops/cpu/histogram_search.h"

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <numeric>

#include "ops/cpu/divergence_search.h"
#include "ops/cpu/histogram_simd.h"

namespace rarefy::ops {
namespace {

constexpr int64_t kSteps = 128;

/// The sum over values spread evenly in their bins of |x - x_hat|^norm (norm 2 with clip_weight, see least_noise).
class ExpectedError {
 public:
  /// `edges` has one more element than `counts`; bin i lies at place layout.base + i before its edges are cut off.
  ExpectedError(const int64_t* counts, std::vector<double> edges, const HistogramLayout& layout, double norm,
                double clip_weight, const TargetGrid& grid)
      : edges_(std::move(edges)),
        weights_(edges_.size()),
        base_(static_cast<double>(layout.base)),
        places_per_unit_(std::ldexp(1.0, -layout.exponent)),
        norm_(norm),
        clip_weight_(clip_weight),
        grid_(grid) {
    if (norm_ == 2.0) {
      sum_moments(counts);
    }
    weigh_edges(counts);
  }

  /// The error, or what at_least gives where that is more than the limit.
  double operator()(const QParams& parameters, double limit) const {
    const auto scale = static_cast<double>(parameters.scale);
    const auto first = static_cast<double>(grid_.qmin - parameters.zero_point);
    const auto last = static_cast<double>(grid_.qmax - parameters.zero_point);
    if (norm_ == 2.0) {
      const double bound = at_least(first * scale, last * scale);
      if (bound > limit) {
        return bound;
      }
    }
    double sum = 0.0;
    for (const auto& [x, count] : points_) {
      const double r = std::fabs(x / scale - std::clamp(std::rint(x / scale), first, last));
      sum += count * (std::pow(r, norm_) + (clip_weight_ - 1.0) * std::max(r * r - 0.25, 0.0)) * std::pow(scale, norm_);
    }
    if (norm_ == 2.0) {
      return sum + RAREFY_ISA_CALL(squared_error_integral, edges_.data(), weights_.data(),
                                   static_cast<int64_t>(edges_.size()), scale, first, last, clip_weight_) *
                       (scale * scale * scale);
    }
    const double half_cell = std::pow(0.5, norm_ + 1.0);
    double integral = 0.0;
    for (size_t i = 0; i < edges_.size(); ++i) {
      const double t = edges_[i] / scale;
      const double k = std::clamp(std::rint(t), first, last);
      const double r = t - k;
      const double whole_cells = 2.0 * k * half_cell;
      integral += weights_[i] * (whole_cells + std::copysign(std::pow(std::fabs(r), norm_ + 1.0), r));
    }
    return sum + integral / (norm_ + 1.0) * std::pow(scale, norm_ + 1.0);
  }

 private:
  /// Sums over bins: of counts, counts * middle, counts * middle^2.
  struct Moments {
    double count = 0.0, sum = 0.0, squares = 0.0;
    Moments with(double more, double middle) const {
      const double moment = more * middle;
      return {count + more, sum + moment, squares + moment * middle};
    }
    /// The sum of counts * (middle - x)^2, less than rounding can have added to it.
    double square_from(double x) const {
      constexpr double kRounding = 1e-10;
      const double whole = squares + x * x * count;
      return std::max(whole - 2.0 * x * sum - kRounding * whole, 0.0);
    }
  };

  void sum_moments(const int64_t* counts) {
    const size_t bins = edges_.size() - 1;
    below_.resize(bins + 1);
    above_.resize(bins + 1);
    const auto with_bin = [&](const Moments& moments, size_t i) {
      return moments.with(static_cast<double>(counts[i]), 0.5 * (edges_[i] + edges_[i + 1]));
    };
    Moments below, above;
    for (size_t i = 0, j = bins; i < bins; ++i) {  // two chains of additions at a time
      below_[i + 1] = below = with_bin(below, i);
      --j;
      above_[j] = above = with_bin(above, j);
    }
  }

  /// Weights of edges: an integral over a bin is the difference of its values at the bin's two edges.
  void weigh_edges(const int64_t* counts) {
    const size_t bins = edges_.size() - 1;
    double before = 0.0;
    for (size_t i = 0; i < bins; ++i) {
      double density = 0.0;
      if (counts[i] != 0) {
        const auto count = static_cast<double>(counts[i]);
        const double width = edges_[i + 1] - edges_[i];
        if (width > 0.0) {
          density = count / width;
        } else {
          points_.emplace_back(edges_[i], count);
        }
      }
      weights_[i] = before - density;
      before = density;
    }
    weights_[bins] = before;
    leave_out_empty_stretches();
  }

  /// Far values make most bins empty.
  void leave_out_empty_stretches() {
    constexpr size_t kGroup = cpu::kSumsOfIntegral;
    size_t kept = 0;
    for (size_t i = 0; i < edges_.size(); i += kGroup) {
      const size_t size = std::min(kGroup, edges_.size() - i);
      const auto from = weights_.begin() + static_cast<std::ptrdiff_t>(i);
      if (size == kGroup && std::all_of(from, from + kGroup, [](double weight) { return weight == 0.0; })) {
        continue;
      }
      if (kept != i) {
        std::copy_n(from, size, weights_.begin() + static_cast<std::ptrdiff_t>(kept));
        std::copy_n(edges_.begin() + static_cast<std::ptrdiff_t>(i), size,
                    edges_.begin() + static_cast<std::ptrdiff_t>(kept));
      }
      kept += size;
    }
    edges_.resize(kept);
    weights_.resize(kept);
  }

  /// No more than the error: what clamping to [first, last] alone costs, from the bins that lie wholly beyond, each with all
  /// its values in its middle.
  double at_least(double first, double last) const {
    const auto bins = static_cast<double>(below_.size() - 1);
    const auto beyond = std::clamp(std::ceil(last * places_per_unit_) - base_, 0.0, bins);
    const auto before = std::clamp(std::floor(first * places_per_unit_) - base_, 0.0, bins);
    return above_[static_cast<size_t>(beyond)].square_from(last) +
           below_[static_cast<size_t>(before)].square_from(first);
  }

  std::vector<double> edges_, weights_;
  std::vector<Moments> below_, above_;             // of the bins before and from an edge on
  std::vector<std::pair<double, double>> points_;  // bins without width: all values are equal
  double base_, places_per_unit_, norm_, clip_weight_;
  TargetGrid grid_;
};

/// The value of rank percent / 100 * (n - 1), the values of a bin spread evenly over it.
double value_at(const std::vector<int64_t>& counts, const std::vector<double>& edges, double percent) {
  const int64_t total = std::accumulate(counts.begin(), counts.end(), int64_t{0});
  const double rank = percent / 100.0 * static_cast<double>(total - 1);
  int64_t before = 0;
  for (size_t i = 0; i < counts.size(); ++i) {
    if (counts[i] != 0 && std::floor(rank) < static_cast<double>(before + counts[i])) {
      const double part = (rank - static_cast<double>(before) + 0.5) / static_cast<double>(counts[i]);
      return edges[i] + (edges[i + 1] - edges[i]) * std::min(part, 1.0);
    }
    before += counts[i];
  }
  return edges.back();
}

}  // namespace

HistogramSearch::HistogramSearch(const int64_t* counts, int64_t bins, float low, float high, const TargetGrid& grid)
    : counts_(counts), bins_(bins), range_{low, high}, grid_(grid), layout_(layout_of_range(low, high, bins)) {}

std::vector<double> HistogramSearch::edges(int64_t bins) const {
  const double width = std::ldexp(1.0, layout_.exponent);
  const auto low = static_cast<double>(range_.low), high = static_cast<double>(range_.high);
  std::vector<double> result(static_cast<size_t>(bins + 1));
  for (int64_t i = 0; i <= bins; ++i) {
    result[static_cast<size_t>(i)] = std::clamp(static_cast<double>(layout_.base + i) * width, low, high);
  }
  return result;
}

HistogramSearch::Bins HistogramSearch::whole() const {
  return {std::vector<int64_t>(counts_, counts_ + bins_), edges(bins_)};
}

HistogramSearch::Bins HistogramSearch::folded() const {
  const auto magnitude_of = [&](int64_t i) {
    const int64_t place = layout_.base + i;
    return place < 0 ? ~place : place;
  };
  const int64_t size = std::max(magnitude_of(0), magnitude_of(bins_ - 1)) + 1;
  Bins result{std::vector<int64_t>(static_cast<size_t>(size)), {}};
  for (int64_t i = 0; i < bins_; ++i) {
    result.counts[static_cast<size_t>(magnitude_of(i))] += counts_[i];
  }
  while (result.counts.size() > 1 && result.counts.back() == 0) {  // beyond the values seen
    result.counts.pop_back();
  }
  const auto reach = static_cast<double>(std::max(std::fabs(range_.low), std::fabs(range_.high)));
  for (size_t i = 0; i <= result.counts.size(); ++i) {
    result.edges.push_back(std::min(std::ldexp(static_cast<double>(i), layout_.exponent), reach));
  }
  return result;
}

ValueRange HistogramSearch::choose(RangeMethod method, double parameter) const {
  switch (method) {
    case RangeMethod::percentile:
      return grid_.allowed(percentile(parameter));
    case RangeMethod::mse:
      return least_error(parameter, kSteps);
    case RangeMethod::sqnr:
      return least_noise(parameter);
    case RangeMethod::kl:
      return grid_.allowed(least_divergence());
    default:
      return grid_.allowed(range_);
  }
}

ValueRange HistogramSearch::least_of(double norm, double clip_weight, int64_t steps) const {
  int64_t used = bins_;
  while (used > 1 && counts_[used - 1] == 0) {
    --used;
  }
  const ExpectedError error(counts_, edges(used), layout_, norm, clip_weight, grid_);
  return Narrowing(range_, grid_, error).search(steps);
}

ValueRange HistogramSearch::least_error(double norm, int64_t steps) const { return least_of(norm, 1.0, steps); }

ValueRange HistogramSearch::least_noise(double clip_weight) const { return least_of(2.0, clip_weight, kSteps); }

ValueRange HistogramSearch::percentile(double percent) const {
  if (percent == 100.0) {
    return range_;
  }
  if (grid_.symmetric) {
    const auto bins = folded();
    const auto end = static_cast<float>(value_at(bins.counts, bins.edges, percent));
    return {std::max(range_.low, -end), std::min(range_.high, end)};
  }
  const auto bins = whole();
  return {static_cast<float>(value_at(bins.counts, bins.edges, 100.0 - percent)),
          static_cast<float>(value_at(bins.counts, bins.edges, percent))};
}

ValueRange HistogramSearch::least_divergence() const {
  if (grid_.symmetric) {
    const auto bins = folded();
    const int64_t levels = grid_.qmax - ((grid_.qmin + grid_.qmax + 1) >> 1) + 1;
    const auto last = ClipDivergence(bins.counts).search(0, levels).second;
    const auto end = static_cast<float>(bins.edges[static_cast<size_t>(last)]);
    return {std::max(range_.low, -end), std::min(range_.high, end)};
  }
  const auto bins = whole();
  // Bins beyond the values seen are empty, and no part of what is clipped.
  const auto place = [&](float x) { return place_of(x, layout_.exponent) - layout_.base; };
  const int64_t begin = place(std::min(range_.low, 0.0f)), end = place(std::max(range_.high, 0.0f)) + 1;
  const std::vector<int64_t> counts(bins.counts.begin() + begin, bins.counts.begin() + end);
  const int64_t zero = range_.low >= 0.0f ? 0 : range_.high <= 0.0f ? end - begin : -layout_.base - begin;
  const auto [first, last] = ClipDivergence(counts).search(zero, grid_.qmax - grid_.qmin + 1);
  return {static_cast<float>(bins.edges[static_cast<size_t>(begin + first)]),
          static_cast<float>(bins.edges[static_cast<size_t>(begin + last)])};
}

}  // namespace rarefy::ops
