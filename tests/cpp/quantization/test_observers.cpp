#include <rarefy/rarefy.h>
#include <torch/torch.h>

#include <cmath>
#include <filesystem>
#include <limits>

#include "catch.h"
#include "parity.h"

using namespace rarefy::quantization;
using Catch::Matchers::ContainsSubstring;
namespace ops = rarefy::ops;

namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();

std::string message_of(const std::function<void()>& body) {
  try {
    body();
  } catch (const c10::Error& e) {
    return e.what_without_backtrace();
  }
  return "nothing was thrown";
}

struct State {
  torch::Tensor hist, low, high, skipped;
  State(int64_t rows, int64_t bins)
      : hist(torch::zeros({rows, bins}, torch::kInt64)),
        low(torch::full({rows}, kInfinity)),
        high(torch::full({rows}, -kInfinity)),
        skipped(torch::zeros({1}, torch::kInt64)) {}
  void observe(const torch::Tensor& x, std::optional<int64_t> axis = std::nullopt) {
    ops::histogram_observe(x, hist, low, high, skipped, axis);
  }
  bool operator==(const State& other) const {
    return hist.equal(other.hist) && low.equal(other.low) && high.equal(other.high) && skipped.equal(other.skipped);
  }
};

double place(double x, int exponent) {
  const auto steps = std::trunc(std::ldexp(std::fabs(x), -exponent));
  return x < 0 ? -1 - steps : steps;
}

/// Counts of all values at once, in plain loops.
torch::Tensor counts_of(const torch::Tensor& x, int64_t bins) {
  const auto values = x.to(torch::kFloat32).contiguous().view(-1);
  double low = 0, high = 0;
  for (int64_t i = 0; i < values.numel(); ++i) {
    low = std::min<double>(low, values[i].item<float>());
    high = std::max<double>(high, values[i].item<float>());
  }
  int exponent = -100;
  while (place(high, exponent) - place(low, exponent) + 1 > static_cast<double>(bins)) {
    ++exponent;
  }
  auto counts = torch::zeros({bins}, torch::kInt64);
  for (int64_t i = 0; i < values.numel(); ++i) {
    const double bin = place(values[i].item<float>(), exponent) - place(low, exponent);
    ++counts.data_ptr<int64_t>()[static_cast<int64_t>(bin)];
  }
  return counts;
}

double error_of(const torch::Tensor& x, const torch::Tensor& low, const torch::Tensor& high, int64_t qmin, int64_t qmax,
                bool symmetric) {
  const auto [scale, zero_point] = ops::choose_qparams(low, high, qmin, qmax, symmetric);
  return (x - ops::fake_quantize(x, scale, zero_point, std::nullopt, qmin, qmax))
      .to(torch::kFloat64)
      .square()
      .sum()
      .item<double>();
}

struct NetImpl : torch::nn::Module {
  rarefy::nn::Linear fc1{nullptr}, fc2{nullptr};
  NetImpl()
      : fc1(register_module("fc1", rarefy::nn::Linear(4, 8))), fc2(register_module("fc2", rarefy::nn::Linear(8, 3))) {}
  torch::Tensor forward(const torch::Tensor& x) { return fc2(torch::relu(fc1(x))); }
};
TORCH_MODULE(Net);

std::vector<torch::Tensor> batches() {
  torch::manual_seed(3);
  std::vector<torch::Tensor> data;
  for (int i = 0; i < 4; ++i) {
    data.push_back(torch::randn({5 + i, 4}) * (i + 1) - 0.2);
  }
  return data;
}

const std::vector<Observer>& gathering() {
  static const std::vector<Observer> all{Histogram{.bins = 256},
                                         Histogram{.bins = 256, .search = RangeSearch::kl},
                                         Histogram{.bins = 256, .search = RangeSearch::none},
                                         Percentile{.percentile = 99.0, .bins = 256},
                                         SQNR{.clip_weight = 3.0, .bins = 256},
                                         MeanNoOutliers{.batches = 8},
                                         MeanNoOutliers{.quantile = 0.1}};
  return all;
}

Net prepared(const Observer& observer) {
  Net net;
  auto config = QConfig::int8();
  config.observer = observer;
  prepare(*net, config);
  return net;
}

void calibrate_on(Net& net, const std::vector<torch::Tensor>& data) {
  calibrate(*net, [&] {
    for (const auto& batch : data) {
      net(batch);
    }
  });
}

FakeQuantizerImpl& input_of(Net& net) { return *net->fc1->quant->find("input"); }

std::filesystem::path temporary(const char* name) {
  // Not by adding literals, which GCC 12 misreads (its bug 105651).
  std::string file = "rarefy_observers_";
  file.append(name);
  return std::filesystem::temp_directory_path() / file;
}

}  // namespace

TEST_CASE("histograms count every value in the bin that it would be in from the start", "[observers]") {
  torch::manual_seed(0);
  const auto x = torch::randn({3, 5, 4, 6}) * 3 + 0.5;
  for (const auto type : {torch::kFloat32, torch::kFloat64, torch::kBFloat16, torch::kFloat16}) {
    const auto typed = x.to(type);
    State whole(1, 64), split(1, 64), rows(5, 64);
    whole.observe(typed.contiguous(at::MemoryFormat::ChannelsLast));
    for (const auto& part : typed.chunk(3, 0)) {
      split.observe(part);
    }
    REQUIRE(whole == split);
    REQUIRE(whole.hist[0].equal(counts_of(typed, 64)));
    rows.observe(typed, 1);
    for (int64_t c = 0; c < 5; ++c) {
      REQUIRE(rows.hist[c].equal(counts_of(typed.select(1, c), 64)));
    }
  }
}

TEST_CASE("histograms by torch's operators are those of the kernels", "[observers]") {
  torch::manual_seed(0);
  for (const auto axis : {std::optional<int64_t>(), std::optional<int64_t>(1)}) {
    State kernel(axis.has_value() ? 4 : 1, 128), anywhere(axis.has_value() ? 4 : 1, 128);
    for (const double scale : {0.1, 1.0, 30.0, 1e-20}) {
      const auto x = torch::randn({7, 4, 9}) * scale;
      kernel.observe(x, axis);
      ops::histogram_observe_anywhere(x, anywhere.hist, anywhere.low, anywhere.high, anywhere.skipped, axis);
      REQUIRE(kernel == anywhere);
    }
    const auto bad = torch::full({2, 4, 1}, kInfinity);
    kernel.observe(bad, axis);
    ops::histogram_observe_anywhere(bad, anywhere.hist, anywhere.low, anywhere.high, anywhere.skipped, axis);
    REQUIRE(kernel == anywhere);
    REQUIRE(kernel.skipped.item<int64_t>() == 1);
  }
}

TEST_CASE("histograms of edges, denormals, zeros and huge values", "[observers]") {
  for (const auto& values : std::vector<std::vector<float>>{{0.0F},
                                                            {-0.0F},
                                                            {5.0F, 5.0F},
                                                            {1e-45F, -1e-45F, 0.0F},
                                                            {3.4028234e38F, -3.4028234e38F, 1e-45F, -1e-45F},
                                                            {1.0F, 2.0F, 4.0F, -1.0F, -2.0F, -4.0F}}) {
    for (const int64_t bins : {16, 2048}) {
      State state(1, bins);
      state.observe(torch::tensor(values));
      REQUIRE(state.hist[0].equal(counts_of(torch::tensor(values), bins)));
      REQUIRE(state.hist.sum().item<int64_t>() == static_cast<int64_t>(values.size()));
    }
  }
}

TEST_CASE("ranges from histograms", "[observers]") {
  torch::manual_seed(1);
  const auto x = torch::cat({torch::randn({20000}), torch::tensor({30.0F})});
  State state(1, 2048);
  state.observe(x);
  for (const auto& [qmin, qmax, symmetric] : std::vector<std::tuple<int64_t, int64_t, bool>>{
           {-128, 127, true}, {0, 255, false}, {-7, 7, true}, {0, 15, false}}) {
    const double whole = error_of(x, state.low, state.high, qmin, qmax, symmetric);
    for (const auto& [method, parameter] : std::vector<std::pair<std::string, double>>{{"mse", 2.0}, {"sqnr", 1.0}}) {
      const auto [low, high] = ops::choose_range_from_histogram(state.hist, state.low, state.high, method, parameter,
                                                                qmin, qmax, symmetric, false);
      REQUIRE(error_of(x, low, high, qmin, qmax, symmetric) <= whole * 1.001);
    }
    for (const auto* method : {"percentile", "kl", "mse"}) {
      const auto [low, high] =
          ops::choose_range_from_histogram(state.hist, state.low, state.high, method,
                                           std::string(method) == "mse" ? 2.0 : 99.9, qmin, qmax, symmetric, true);
      REQUIRE((high.item<float>() < 30.0F || std::string(method) != "percentile"));
      const auto scale = std::get<0>(ops::choose_qparams(low, high, qmin, qmax, symmetric)).item<float>();
      int exponent = 0;
      REQUIRE(std::frexp(scale, &exponent) == 0.5F);
    }
  }
  const auto [low, high] =
      ops::choose_range_from_histogram(state.hist, state.low, state.high, "percentile", 99.0, 0, 255, false, false);
  REQUIRE(std::fabs(high.item<float>() - torch::quantile(x, 0.99).item<float>()) < 0.05F);
  REQUIRE(std::fabs(low.item<float>() - torch::quantile(x, 0.01).item<float>()) < 0.05F);
}

TEST_CASE("searches on a tensor gain on its range", "[observers]") {
  torch::manual_seed(2);
  const auto x = torch::randn({3, 400}).pow(3);
  const auto [low, high] = ops::mse_range(x, 0, -7, 7, true);
  const auto [scale, zero_point] = ops::half_quadratic_qparams(x, 0, 0, 15, false);
  for (int64_t i = 0; i < 3; ++i) {
    const auto row = x[i];
    REQUIRE(error_of(row, low[i], high[i], -7, 7, true) < error_of(row, row.min(), row.max(), -7, 7, true));
    const auto by_range = ops::choose_qparams(row.min(), row.max(), 0, 15, false);
    const auto loss = [&](const torch::Tensor& s, const torch::Tensor& z) {
      return (row - ops::fake_quantize(row, s, z, std::nullopt, 0, 15)).abs().pow(0.7).sum().item<double>();
    };
    REQUIRE(loss(scale[i], zero_point[i]) <= loss(std::get<0>(by_range), std::get<1>(by_range)) * 1.00001);
  }
  const auto importance = torch::zeros({400});
  importance[0] = 1.0;
  const auto [exact, unused] = ops::mse_range(x, 0, -7, 7, true, 2.0, 100, 2048, importance);
  REQUIRE(exact.isfinite().all().item<bool>());
}

TEST_CASE("channels in long runs are searched like tensors of their own", "[observers]") {
  torch::manual_seed(3);
  auto x = torch::randn({3, 2, 30, 25});
  x[2][0][29][24] = 300.0;  // bins move after most values were counted
  for (const bool symmetric : {true, false}) {
    const auto qmin = symmetric ? -8 : 0, qmax = symmetric ? 7 : 15;
    const auto [low, high] = ops::mse_range(x, 1, qmin, qmax, symmetric, 2.0, 128, 64);
    State state(2, 64);
    state.observe(x, 1);
    const auto [chosen_low, chosen_high] =
        ops::choose_range_from_histogram(state.hist, state.low, state.high, "mse", 2.0, qmin, qmax, symmetric, false);
    REQUIRE(low.equal(chosen_low));
    REQUIRE(high.equal(chosen_high));
    for (int64_t c = 0; c < 2; ++c) {
      const auto row = x.select(1, c).contiguous();
      const auto [own_low, own_high] = ops::mse_range(row, std::nullopt, qmin, qmax, symmetric, 2.0, 128, 64);
      REQUIRE(low[c].item<float>() == own_low.item<float>());
      REQUIRE(high[c].item<float>() == own_high.item<float>());
      REQUIRE(state.hist[c].equal(counts_of(row, 64)));
      // A value lies within a bin of where it counts, and bins are at most twice as wide as the range over 64.
      const double width = (row.max() - row.min()).item<double>() / 32.0, count = 2250.0;
      const double seen = error_of(row, row.min(), row.max(), qmin, qmax, symmetric);
      const double bound = std::pow(std::sqrt(seen / count) + width, 2.0) * count;
      REQUIRE(error_of(row, low[c], high[c], qmin, qmax, symmetric) <= bound);
    }
  }
  x[2][1][29][24] = std::numeric_limits<float>::quiet_NaN();
  REQUIRE_THAT(message_of([&] { ops::mse_range(x, 1, -8, 7, true, 2.0, 128, 64); }),
               ContainsSubstring("[mse_range] input must be finite"));
}

TEST_CASE("observers print, compare and check themselves", "[observers]") {
  REQUIRE(str(Observer(Histogram{})) == "Histogram(bins=2048, search='mse', norm=2)");
  REQUIRE(str(Observer(MeanNoOutliers{})) == "MeanNoOutliers(sigma=None, quantile=None, batches=1024)");
  REQUIRE(follows_latest(MSE{}));
  REQUIRE_FALSE(follows_latest(Histogram{}));
  REQUIRE(averaging_constant(HalfQuadratic{}) == 1.0);
  REQUIRE(Observer(Percentile{}) != Observer(Percentile{99.0}));
  REQUIRE_THAT(message_of([] { validate(Observer(SQNR{.clip_weight = 0.5})); }),
               ContainsSubstring("[SQNR] clip_weight must be finite and at least 1, got 0.5"));
  auto config = QConfig::int8();
  config.observer = MSE{};
  REQUIRE_THAT(message_of([&] { config.validate(); }),
               ContainsSubstring("[QConfig] observer must gather over batches"));
  config.observer = std::nullopt;
  config.weight_observer = Histogram{};
  REQUIRE_THAT(
      message_of([&] { config.validate(); }),
      ContainsSubstring("[QConfig] weight_observer must be Latest, MSE, HalfQuadratic, LSQ, TQT or LearnedBits"));
}

TEST_CASE("models are calibrated by every observer, and converted", "[observers]") {
  const auto data = batches();
  for (const auto& observer : gathering()) {
    INFO(str(observer));
    auto net = prepared(observer);
    calibrate_on(net, data);
    RangeStatistics all(observer, 1);
    auto skipped = torch::zeros({1}, torch::kInt64);
    for (const auto& batch : data) {
      all->observe(batch, std::nullopt, skipped);
    }
    const auto [low, high] = all->choose(input_of(net).options.scheme);
    REQUIRE(input_of(net).min_val.equal(low));
    REQUIRE(input_of(net).max_val.equal(high));
    // In two calibrations as in one.
    auto twice = prepared(observer);
    calibrate_on(twice, {data[0]});
    calibrate_on(twice, {data[1], data[2], data[3]});
    REQUIRE(input_of(twice).scale.equal(input_of(net).scale));
    // A copy is one, statistics included.
    const auto copied = std::dynamic_pointer_cast<FakeQuantizerImpl>(input_of(net).clone());
    for (const auto& [name, tensor] : input_of(net).statistics->tensors()) {
      REQUIRE(copied->statistics->tensors().at(name).equal(tensor));
    }
    net->eval();
    const auto scores = net(data[0]);
    convert(*net);
    REQUIRE(torch::allclose(net(data[0]), scores, 1e-4, 1e-5));
    REQUIRE_FALSE(input_of(net).statistics);
    for (const auto& item : net->named_buffers()) {
      REQUIRE(item.key().find("statistics") == std::string::npos);
    }
  }
}

TEST_CASE("a calibration that fails leaves statistics as they were", "[observers]") {
  auto net = prepared(Histogram{.bins = 256});
  calibrate_on(net, batches());
  const auto before = input_of(net).statistics->hist.clone(), scale = input_of(net).scale.clone();
  REQUIRE_THROWS(calibrate(*net, [&] {
    net(batches()[0] * 100);
    TORCH_CHECK_VALUE(false, "stop");
  }));
  REQUIRE(input_of(net).statistics->hist.equal(before));
  REQUIRE(input_of(net).scale.equal(scale));
}

TEST_CASE("training rounds with what statistics have seen so far", "[observers]") {
  FakeQuantizer quantizer(
      FakeQuantizerOptions{.scheme = {.bits = 8, .symmetric = false}, .observer = Histogram{.bins = 256}});
  RangeStatistics all(Observer(Histogram{.bins = 256}), 1);
  auto skipped = torch::zeros({1}, torch::kInt64);
  for (const auto& batch : batches()) {
    const auto x = batch.clone().requires_grad_();
    const auto y = quantizer(x);
    all->observe(batch, std::nullopt, skipped);
    const auto [low, high] = all->choose(quantizer->options.scheme);
    const auto [scale, zero_point] = ops::choose_qparams(low, high, 0, 255, false);
    REQUIRE(y.equal(ops::fake_quantize(batch, scale, zero_point, std::nullopt, 0, 255)));
    y.sum().backward();
    REQUIRE(x.grad().defined());
  }
}

TEST_CASE("weights are searched once for the same values", "[observers]") {
  torch::manual_seed(4);
  for (const Observer& observer : {Observer(MSE{}), Observer(HalfQuadratic{})}) {
    FakeQuantizer quantizer(
        FakeQuantizerOptions{.scheme = {.bits = 4, .narrow_range = true, .granularity = PerChannel{0}},
                             .observer = observer,
                             .channels = 3});
    const auto weight = torch::randn({3, 50}).pow(3).requires_grad_();
    quantizer(weight);
    const auto version = quantizer->scale._version();
    const auto scale = quantizer->scale.clone();
    quantizer(weight);
    REQUIRE(quantizer->scale._version() == version);
    {
      const torch::NoGradGuard no_grad;
      weight.mul_(2);
    }
    quantizer(weight);
    REQUIRE(torch::allclose(quantizer->scale, scale * 2));
    const torch::NoGradGuard no_grad;
    weight[0][0] = kInfinity;
    quantizer->name = "fc.quant.weight";
    REQUIRE_THAT(
        message_of([&] { quantizer(weight); }),
        ContainsSubstring("the weight of fc.quant.weight must be finite, got 1 NaN or infinite values of 150"));
  }
  FakeQuantizer weighed(FakeQuantizerOptions{.scheme = {.bits = 4, .narrow_range = true}, .observer = MSE{}});
  const auto weight = torch::randn({400});
  weight[0] = 20.0;
  weighed(weight);
  const auto narrow = weighed->max_val.item<float>();
  weighed->importance = torch::ones({400});
  weighed->importance[0] = 1000.0;
  weighed(weight.clone());
  REQUIRE(weighed->max_val.item<float>() > narrow);
}

TEST_CASE("statistics are saved, and ranges chosen again without data", "[observers]") {
  const auto path = temporary("statistics");
  const auto data = batches();
  auto net = prepared(Histogram{.bins = 256});
  REQUIRE_THAT(message_of([&] { save_statistics(*net, path); }),
               ContainsSubstring("but these have not: fc1.quant.input, fc2.quant.input"));
  calibrate_on(net, data);
  save_statistics(*net, path);
  for (const Observer& observer :
       {Observer(Percentile{.percentile = 99.0, .bins = 256}), Observer(MinMax{}), Observer(SQNR{.bins = 256})}) {
    INFO(str(observer));
    auto loaded = prepared(observer), expected = prepared(observer);
    load_statistics(*loaded, path);
    calibrate_on(expected, data);
    REQUIRE(input_of(loaded).scale.equal(input_of(expected).scale));
    REQUIRE(input_of(loaded).zero_point.equal(input_of(expected).zero_point));
    REQUIRE(input_of(loaded).quantize);
  }
  auto other = prepared(Histogram{});
  REQUIRE_THAT(message_of([&] { load_statistics(*other, path); }),
               ContainsSubstring("must have a histogram of 2048 bins, got the statistics of Histogram(bins=256"));
  struct OneImpl : torch::nn::Module {
    rarefy::nn::Linear only{nullptr};
    OneImpl() : only(register_module("only", rarefy::nn::Linear(4, 8))) {}
  } one;
  prepare(one, QConfig::int8());
  REQUIRE_THAT(message_of([&] { load_statistics(one, path); }),
               ContainsSubstring("missing: [only.quant.input], unexpected: [fc1.quant.input, fc2.quant.input]"));
  std::filesystem::remove(path);
}

TEST_CASE("statistics over processes are those of all data", "[observers]") {
  // Two processes in one: each all-reduce is answered with what the other one would give.
  const auto data = batches();
  for (const auto& observer : {Observer(Histogram{.bins = 256}), Observer(MeanNoOutliers{.batches = 8})}) {
    RangeStatistics mine(observer, 1), other(observer, 1), both(observer, 1);
    auto skipped = torch::zeros({1}, torch::kInt64);
    mine->observe(data[0], std::nullopt, skipped);
    other->observe(data[3], std::nullopt, skipped);
    both->observe(data[0], std::nullopt, skipped);
    both->observe(data[3], std::nullopt, skipped);
    const auto theirs = other->tensors();
    const auto max = [&](torch::Tensor& packed) {
      packed.copy_(torch::maximum(packed, torch::cat({-theirs.at("hist_min"), theirs.at("hist_max")})));
    };
    const auto sum = [&](torch::Tensor& counts) {
      auto low = both->hist_min.clone(), high = both->hist_max.clone();
      ops::histogram_add(counts, low, high, theirs.at("hist"), theirs.at("hist_min"), theirs.at("hist_max"));
    };
    const auto gather = [&](const torch::Tensor& values) {
      const bool is_low = values.const_data_ptr() == mine->batch_min.const_data_ptr();
      return std::vector<torch::Tensor>{values.clone(), theirs.at(is_low ? "batch_min" : "batch_max")};
    };
    mine->merge_over_processes(max, sum, gather);
    for (const auto& [name, tensor] : both->tensors()) {
      REQUIRE(mine->tensors().at(name).equal(tensor));
    }
  }
}
