// Every observer on every grid, type and layout, beside plain loops: the range that is chosen, and the values on its grid.
#include <rarefy/quantization/fake_quantizer.h>
#include <torch/torch.h>

#include <algorithm>
#include <cmath>
#include <utility>
#include <vector>

#include "catch.h"

using namespace rarefy::quantization;
using torch::Tensor;

namespace {

constexpr int64_t kBins = 64, kSteps = 20;
using Row = std::vector<double>;
using Range = std::pair<double, double>;

std::vector<Observer> observers() {
  return {MinMax{},
          MovingAverage{0.3},
          Latest{},
          Histogram{.bins = kBins, .search = RangeSearch::none},
          Histogram{.bins = kBins},
          Histogram{.bins = kBins, .search = RangeSearch::kl},
          Percentile{.percentile = 97.0, .bins = kBins},
          SQNR{.clip_weight = 1.0, .bins = kBins},
          MeanNoOutliers{.sigma = 0.8},
          MSE{.steps = kSteps, .bins = 0},
          HalfQuadratic{}};
}

std::vector<Scheme> schemes() {
  return {Scheme{.bits = 8, .symmetric = false}, Scheme{.bits = 4, .narrow_range = true},
          Scheme{.bits = 4, .symmetric = false, .granularity = PerChannel{1}}, Scheme{.granularity = PerChannel{1}},
          Scheme{.bits = 12, .symmetric = false}};
}

/// The same values: contiguous, channels-last, every second of a row, with the axes the other way round in memory.
std::vector<Tensor> layouts(const Tensor& x) {
  return {x.contiguous(), x.contiguous(at::MemoryFormat::ChannelsLast),
          x.repeat_interleave(2, -1).slice(-1, 0, std::nullopt, 2),
          x.permute({3, 2, 1, 0}).contiguous().permute({3, 2, 1, 0})};
}

std::vector<Tensor> batches(at::ScalarType type) {
  torch::manual_seed(1);
  const auto spread = torch::tensor({1.0, 0.1, 30.0, 2.0}).view({1, 4, 1, 1});
  std::vector<Tensor> data;
  for (int i = 1; i <= 4; ++i) {
    const auto x = torch::randn({3, 4, 5, 6}) * spread * i;
    data.push_back(torch::cat({x.slice(1, 0, 1).abs(), x.slice(1, 1)}, 1).to(type));
  }
  return data;
}

/// What shares a scale, as observers see it: in float32.
std::vector<Row> rows_of(const Tensor& x, const Scheme& scheme) {
  const auto values = x.to(torch::kFloat32).contiguous();
  const auto channels = scheme.axis().has_value() ? values.size(1) : 1, inner = values.size(2) * values.size(3);
  std::vector<Row> rows(static_cast<size_t>(channels));
  for (int64_t i = 0; i < values.numel(); ++i) {
    const auto row = channels == 1 ? 0 : i / inner % channels;
    rows[static_cast<size_t>(row)].push_back(values.const_data_ptr<float>()[i]);
  }
  return rows;
}

Range ends_of(const Row& row) {
  const auto [low, high] = std::minmax_element(row.begin(), row.end());
  return {*low, *high};
}

struct Grid {
  double scale, zero_point, qmin, qmax;
};

/// choose_qparams, in plain arithmetic; the ranges of this file are neither empty nor huge.
Grid grid_of(Range range, const Scheme& scheme) {
  const double low = std::min(range.first, 0.0), high = std::max(range.second, 0.0);
  const auto qmin = static_cast<double>(scheme.qmin()), qmax = static_cast<double>(scheme.qmax());
  if (low == high) {
    return {1.0, scheme.symmetric && scheme.signed_range() ? 0.0 : qmin, qmin, qmax};
  }
  if (scheme.symmetric) {
    return {static_cast<float>(std::max(-low, high) / qmax), 0.0, qmin, qmax};
  }
  const double scale = static_cast<float>((high - low) / (qmax - qmin));
  return {scale, std::clamp(qmin - std::nearbyint(low / scale), qmin, qmax), qmin, qmax};
}

double on_grid(double x, const Grid& grid) {
  return (std::clamp(std::nearbyint(x / grid.scale) + grid.zero_point, grid.qmin, grid.qmax) - grid.zero_point) *
         grid.scale;
}

double error_of(const Row& row, const Grid& grid, double norm = 2.0) {
  double sum = 0.0;
  for (const double x : row) {
    sum += std::pow(std::fabs(x - on_grid(x, grid)), norm);
  }
  return sum;
}

/// The least error of ranges that are a part of the row's own.
double least_error(const Row& row, const Scheme& scheme) {
  const auto [low, high] = ends_of(row);
  const double reach = std::max(-std::min(low, 0.0), std::max(high, 0.0));
  double least = error_of(row, grid_of({low, high}, scheme));
  for (int64_t i = 1; i <= kSteps; ++i) {
    const double part = static_cast<double>(i) / static_cast<double>(kSteps);
    const Range candidate = scheme.symmetric ? Range(std::max(low, -part * reach), std::min(high, part * reach))
                                             : Range(part * low, part * high);
    least = std::min(least, error_of(row, grid_of(candidate, scheme)));
  }
  return least;
}

double average_without_outliers(const Row& ends, double sigma) {
  const auto mean = [](const Row& row) {
    double sum = 0.0;
    for (const double x : row) {
      sum += x;
    }
    return sum / static_cast<double>(row.size());
  };
  const double center = mean(ends);
  double variance = 0.0;
  for (const double x : ends) {
    variance += (x - center) * (x - center) / static_cast<double>(ends.size());
  }
  Row kept;
  for (const double x : ends) {
    if (std::fabs(x - center) <= sigma * std::sqrt(variance)) {
      kept.push_back(x);
    }
  }
  return mean(kept.empty() ? ends : kept);
}

/// A bin is at most twice as wide as the range over the number of bins.
double widest_bin(const Row& row) {
  const auto [low, high] = ends_of(row);
  return 2 * (std::max(high, 0.0) - std::min(low, 0.0)) / static_cast<double>(kBins);
}

/// Checks the range of one row, of which `seen` has the batches.
struct RangeCheck {
  const Scheme& scheme;
  const std::vector<Row>& seen;
  Range found;
  Row everything, lows, highs;

  RangeCheck(const Scheme& s, const std::vector<Row>& batches_of_row, Range range)
      : scheme(s), seen(batches_of_row), found(std::move(range)) {
    for (const auto& row : seen) {
      everything.insert(everything.end(), row.begin(), row.end());
      const auto [low, high] = ends_of(row);
      lows.push_back(low);
      highs.push_back(high);
    }
  }

  void operator()(const MinMax&) const { CHECK(found == ends_of(everything)); }
  void operator()(const Latest&) const { CHECK(found == Range(lows.back(), highs.back())); }
  void operator()(const MovingAverage& observer) const {
    const auto averaged = [&](const Row& ends) {
      double average = ends[0];
      for (size_t i = 1; i < ends.size(); ++i) {
        average = static_cast<float>((1 - observer.constant) * average + observer.constant * ends[i]);
      }
      return average;
    };
    CHECK(found == Range(averaged(lows), averaged(highs)));
  }
  void operator()(const MeanNoOutliers& observer) const {
    CHECK(found.first == Approx(average_without_outliers(lows, *observer.sigma)).epsilon(1e-6));
    CHECK(found.second == Approx(average_without_outliers(highs, *observer.sigma)).epsilon(1e-6));
  }
  void operator()(const Histogram& observer) const {
    if (observer.search == RangeSearch::none) {
      CHECK(found == ends_of(everything));
    } else if (observer.search == RangeSearch::kl) {
      const auto [low, high] = ends_of(everything);
      CHECK((found.first >= std::min(low, -std::max(high, -low)) && found.second <= std::max(high, -low)));
      CHECK(found.second - found.first > 0);
    } else {
      least_of_histogram();
    }
  }
  void operator()(const SQNR&) const { least_of_histogram(); }
  void operator()(const Percentile& observer) const {
    const auto quantile = [](Row values, double percent) {
      std::sort(values.begin(), values.end());
      return values[static_cast<size_t>(std::nearbyint(percent / 100 * static_cast<double>(values.size() - 1)))];
    };
    // Beside the bin, one value on either side.
    const auto near = [&](double got, const Row& values, double percent) {
      const double one = 100.0 / static_cast<double>(values.size()), bin = widest_bin(everything);
      CHECK(got >= quantile(values, std::max(percent - one, 0.0)) - bin);
      CHECK(got <= quantile(values, std::min(percent + one, 100.0)) + bin);
    };
    if (scheme.symmetric) {
      Row magnitudes;
      for (const double x : everything) {
        magnitudes.push_back(std::fabs(x));
      }
      near(std::max(-found.first, found.second), magnitudes, observer.percentile);
    } else {
      near(found.first, everything, 100 - observer.percentile);
      near(found.second, everything, observer.percentile);
    }
  }
  void operator()(const MSE&) const {
    CHECK(error_of(seen.back(), grid_of(found, scheme)) <= least_error(seen.back(), scheme) * (1 + 2e-5) + 1e-9);
  }
  template <typename Other>
  void operator()(const Other&) const {
    FAIL("no loop for this observer");
  }

  /// A value lies within a bin of where it counts.
  void least_of_histogram() const {
    const auto count = static_cast<double>(everything.size());
    const double most = std::sqrt(least_error(everything, scheme) / count) + 2 * widest_bin(everything);
    CHECK(error_of(everything, grid_of(found, scheme)) <= most * most * count);
    CHECK(error_of(everything, grid_of(found, scheme)) <=
          1.05 * error_of(everything, grid_of(ends_of(everything), scheme)) + 1e-9);
  }
};

FakeQuantizer observed(const Observer& observer, const Scheme& scheme, const std::vector<Tensor>& data) {
  FakeQuantizer quantizer(
      FakeQuantizerOptions{.scheme = scheme, .observer = observer, .channels = data.front().size(1)});
  quantizer->eval();
  quantizer->quantize = false;
  for (const auto& x : data) {
    REQUIRE(quantizer->forward(x).is_same(x));
  }
  quantizer->observe = false;
  quantizer->quantize = true;
  quantizer->settle();
  return quantizer;
}

/// x on the grid by a loop over its elements, in the type it is computed in.
template <typename T>
Tensor loop_over(const Tensor& x, const FakeQuantizerImpl& quantizer) {
  const auto& scheme = quantizer.options.scheme;
  const Tensor values = x.to(c10::CppTypeToScalarType<T>::value).contiguous().clone();
  const int64_t inner = values.size(2) * values.size(3), channels = scheme.axis().has_value() ? values.size(1) : 1;
  for (int64_t i = 0; i < values.numel(); ++i) {
    const int64_t row = channels == 1 ? 0 : i / inner % channels;
    const auto scale = static_cast<T>(quantizer.scale[row].item<float>());
    const auto zero_point = static_cast<T>(quantizer.zero_point[row].item<int32_t>());
    T& value = values.data_ptr<T>()[i];
    const T q = std::clamp(std::nearbyint(value / scale) + zero_point, static_cast<T>(scheme.qmin()),
                           static_cast<T>(scheme.qmax()));
    value = (q - zero_point) * scale;
  }
  return values.to(x.scalar_type());
}

Tensor rounded_by_loop(const Tensor& x, const FakeQuantizerImpl& quantizer) {
  return x.scalar_type() == torch::kFloat64 ? loop_over<double>(x, quantizer) : loop_over<float>(x, quantizer);
}

void check_ranges(const Observer& observer, const FakeQuantizerImpl& quantizer, const std::vector<Tensor>& data) {
  const auto& scheme = quantizer.options.scheme;
  for (int64_t row = 0; row < quantizer.scale.numel(); ++row) {
    std::vector<Row> seen;
    for (const auto& x : data) {
      seen.push_back(rows_of(x, scheme).at(static_cast<size_t>(row)));
    }
    const Grid chosen{quantizer.scale[row].item<float>(),
                      static_cast<double>(quantizer.zero_point[row].item<int32_t>()),
                      static_cast<double>(scheme.qmin()), static_cast<double>(scheme.qmax())};
    if (std::holds_alternative<HalfQuadratic>(observer)) {  // its aim is the error to the power of 0.7
      const auto by_range = grid_of(ends_of(seen.back()), scheme);
      CHECK(error_of(seen.back(), chosen, 0.7) <= error_of(seen.back(), by_range, 0.7) * (1 + 1e-5));
      continue;
    }
    const Range found{quantizer.min_val[row].item<float>(), quantizer.max_val[row].item<float>()};
    std::visit(RangeCheck(scheme, seen, found), observer);
    const auto expected = grid_of(found, scheme);
    CHECK(chosen.scale == expected.scale);
    CHECK(chosen.zero_point == expected.zero_point);
  }
}

}  // namespace

TEST_CASE("every observer on every grid, type and layout, beside plain loops", "[observers][matrix]") {
  for (const auto type : {torch::kFloat32, torch::kFloat64, torch::kBFloat16, torch::kFloat16}) {
    const auto data = batches(type);
    for (const auto& observer : observers()) {
      for (const auto& scheme : schemes()) {
        CAPTURE(str(observer), scheme.str(), type);
        auto quantizer = observed(observer, scheme, data);
        check_ranges(observer, *quantizer, data);
        for (size_t layout = 0; layout < 4; ++layout) {
          CAPTURE(layout);
          std::vector<Tensor> laid_out;
          for (const auto& x : data) {
            laid_out.push_back(layouts(x)[layout]);
          }
          auto other = observed(observer, scheme, laid_out);
          if (std::holds_alternative<HalfQuadratic>(observer)) {  // its sums follow the memory
            CHECK(other->scale.allclose(quantizer->scale));
          } else {
            CHECK(other->scale.equal(quantizer->scale));
            CHECK(other->min_val.equal(quantizer->min_val));
            CHECK(other->max_val.equal(quantizer->max_val));
          }
          for (const auto& x : {data.front(), data.back() * 3}) {  // and beyond the range
            CHECK(quantizer->forward(layouts(x)[layout]).equal(rounded_by_loop(x, *quantizer)));
          }
        }
      }
    }
  }
}

TEST_CASE("every observer on one element and on none", "[observers][matrix]") {
  for (const auto type : {torch::kFloat32, torch::kFloat64, torch::kBFloat16, torch::kFloat16}) {
    const auto options = torch::TensorOptions().dtype(type);
    for (const auto& observer : observers()) {
      for (const auto& scheme : schemes()) {
        CAPTURE(str(observer), scheme.str(), type);
        for (const double value : {1.5, -3.0, 0.0}) {
          const auto x = torch::full({1, 1, 1, 1}, value, options);
          auto quantizer = observed(observer, scheme, {x});
          const auto y = quantizer->forward(x);
          CHECK(y.equal(rounded_by_loop(x, *quantizer)));
          CHECK(y.item<double>() == Approx(value).epsilon(0x1p-6));
          const auto nothing = torch::empty({0, 1, 2, 2}, options);
          CHECK(quantizer->forward(nothing).sizes() == nothing.sizes());
          quantizer->observe = true;
          quantizer->quantize = false;
          const auto before = quantizer->min_val.clone();
          CHECK_THROWS_WITH(quantizer->forward(nothing),
                            Catch::Matchers::ContainsSubstring("input must not be empty, got shape [0, 1, 2, 2]"));
          CHECK(quantizer->min_val.equal(before));
        }
      }
    }
  }
}
