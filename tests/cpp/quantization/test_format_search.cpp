// Scales that are searched for, of every scheme that has scales of its own; tests/python/test_format_search.py has the plain loops.
#include <rarefy/rarefy.h>
#include <torch/torch.h>

#include <cmath>

#include "catch.h"

using namespace rarefy::quantization;
using Catch::Matchers::ContainsSubstring;
namespace ops = rarefy::ops;

namespace {

std::string message_of(const std::function<void()>& body) {
  try {
    body();
  } catch (const c10::Error& e) {
    return e.what_without_backtrace();
  }
  return "nothing was thrown";
}

torch::Tensor heavy_tails(at::IntArrayRef sizes) {
  torch::manual_seed(0);
  return torch::randn(sizes).pow(3);
}

}  // namespace

TEST_CASE("groups are searched one by one, the last and shorter one too", "[formats][observers]") {
  const auto x = heavy_tails({3, 10});
  const Scheme scheme{.bits = 4, .symmetric = false, .granularity = PerGroup{4}};
  for (const Observer& observer : {Observer(MSE{}), Observer(HalfQuadratic{})}) {
    const auto found = search_scheme(x, scheme, observer);
    REQUIRE(found.scale.sizes() == at::IntArrayRef({3, 3}));
    for (int64_t row = 0; row < 3; ++row) {
      for (int64_t group = 0; group < 3; ++group) {
        const auto values = x[row].slice(0, 4 * group, std::min<int64_t>(4 * group + 4, 10)).contiguous();
        if (std::holds_alternative<MSE>(observer)) {
          const auto [low, high] = ops::mse_range(values, std::nullopt, 0, 15, false);
          REQUIRE(found.low[row][group].item<float>() == low.item<float>());
          REQUIRE(found.high[row][group].item<float>() == high.item<float>());
        } else {
          const auto [scale, zero_point] = ops::half_quadratic_qparams(values, std::nullopt, 0, 15, false);
          REQUIRE(found.scale[row][group].item<float>() == scale.item<float>());
          REQUIRE(found.zero_point[row][group].item<int32_t>() == zero_point.item<int32_t>());
        }
      }
    }
  }
}

TEST_CASE("minifloats are searched with the error of their cast", "[formats][observers]") {
  const auto x = heavy_tails({4, 64});
  for (const bool power_of_two : {false, true}) {
    Scheme scheme = Scheme::minifloat(Minifloat::e2m1(), PerChannel{0});
    scheme.power_of_two = power_of_two;
    const auto found = search_scheme(x, scheme, MSE{});
    const auto own = std::get<0>(scheme_qparams(x, scheme));
    const std::vector<c10::SymInt> no_block;
    const auto error = [&](const torch::Tensor& scale) {
      return (x - ops::cast_minifloat(x, scale, 0, no_block, 2, 1, 1, "none")).square().sum(1);
    };
    REQUIRE((error(found.scale) <= error(own) * (1 + 1e-6)).all().item<bool>());
    REQUIRE(error(found.scale).sum().item<float>() < error(own).sum().item<float>());
    for (int64_t i = 0; power_of_two && i < 4; ++i) {
      int exponent = 0;
      REQUIRE(std::frexp(found.scale[i].item<float>(), &exponent) == 0.5f);
    }
  }
}

TEST_CASE("a minifloat's scale has the least error of all that are tried", "[formats][observers]") {
  const auto x = heavy_tails({3, 2500});  // errors are looked at every 1,024 values
  const auto importance = torch::rand({3, 2500});
  const auto scheme = Scheme::minifloat(Minifloat::e2m1(), PerChannel{0});
  constexpr int64_t kSteps = 20;
  const std::vector<c10::SymInt> no_block;
  for (const auto& weight : {std::optional<torch::Tensor>(), std::optional(importance)}) {
    const auto found = search_scheme(x, scheme, MSE{.steps = kSteps, .bins = 0}, weight);
    const auto error = [&](const torch::Tensor& scale) {
      const auto square = (x - ops::cast_minifloat(x, scale, 0, no_block, 2, 1, 1, "none")).square();
      return (weight.has_value() ? square * *weight : square).to(torch::kFloat64).sum(1);
    };
    const auto least = error(found.scale.flatten());
    for (int64_t i = 1; i <= kSteps; ++i) {
      const auto end = x.abs().amax(1) * (static_cast<double>(i) / static_cast<double>(kSteps));
      REQUIRE((least <= error(end / 6.0) * (1 + 1e-5)).all().item<bool>());
    }
  }
}

TEST_CASE("activations in formats are calibrated by every observer that serves them", "[formats][observers]") {
  const auto data = heavy_tails({4, 500});
  const std::vector<Observer> observers = {MinMax{}, Histogram{.bins = 256},
                                           Percentile{.percentile = 99.0, .bins = 256}, SQNR{.bins = 256},
                                           MeanNoOutliers{}};
  const std::vector<Scheme> schemes = {Scheme::minifloat(Minifloat::e4m3()), Scheme::minifloat(Minifloat::e2m1()),
                                       Scheme{.bits = 8, .power_of_two = true}, Scheme{.bits = 12, .symmetric = false},
                                       Scheme{.bits = 4, .straight_through = StraightThrough::pass}};
  for (const auto& scheme : schemes) {
    for (const auto& observer : observers) {
      INFO(scheme.str() << ", " << str(observer));
      FakeQuantizer quantizer(FakeQuantizerOptions{.scheme = scheme, .observer = observer});
      quantizer->eval();
      quantizer->quantize = false;
      for (int64_t i = 0; i < 4; ++i) {
        REQUIRE(quantizer(data[i]).equal(data[i]));
      }
      quantizer->observe = false;
      quantizer->quantize = true;
      REQUIRE(quantizer->calibrated());
      const auto y = quantizer(data[0]);
      REQUIRE(y.equal(simulate(data[0], quantizer->scale, quantizer->zero_point, scheme)));
      const auto [scale, zero_point] = scheme_qparams(torch::stack({quantizer->min_val, quantizer->max_val}), scheme);
      REQUIRE(quantizer->scale.equal(scale));
      REQUIRE(quantizer->zero_point.equal(zero_point));
    }
  }
}

TEST_CASE("weights in groups are searched once for the same values", "[formats][observers]") {
  auto weight = heavy_tails({4, 24}).requires_grad_();
  const Scheme scheme{.bits = 3, .granularity = PerGroup{8}};
  FakeQuantizer quantizer(FakeQuantizerOptions{.scheme = scheme, .observer = MSE{}, .channels = 4, .shape = {4, 24}});
  quantizer(weight);
  REQUIRE(quantizer->scale.equal(search_scheme(weight.detach(), scheme, MSE{}).scale));
  const auto version = quantizer->scale._version();
  quantizer(weight);
  REQUIRE(quantizer->scale._version() == version);
  quantizer->importance = torch::rand({1, 24}).pow(4);
  quantizer(weight.clone());
  REQUIRE(quantizer->scale.equal(search_scheme(weight.detach(), scheme, MSE{}, quantizer->importance).scale));
}

TEST_CASE("what cannot be observed is refused by name", "[formats][observers]") {
  const std::vector<std::tuple<Scheme, Observer, std::string>> cases = {
      {Scheme::nf4(), MSE{}, "its scales are those of the very tensor that is rounded"},
      {Scheme::mx(MXElement::e4m3), Histogram{}, "its scales are those of the very tensor that is rounded"},
      {Scheme::codebook(16), MSE{}, "k-means chooses its values"},
      {Scheme::minifloat(Minifloat::e4m3()), Histogram{.search = RangeSearch::kl},
       "the divergence (kl) is of integers"},
      {Scheme::minifloat(Minifloat::e4m3()), HalfQuadratic{}, "half-quadratic splitting is of integers"},
      {Scheme{.power_of_two = true}, HalfQuadratic{}, "finds scales that are no powers of two"},
      {Scheme{.granularity = PerGroup{8}}, SQNR{}, "statistics over batches are of the tensor or its channels"},
  };
  for (const auto& [scheme, observer, reason] : cases) {
    const auto& s = scheme;
    const auto& o = observer;
    REQUIRE(why_not_observed(s, o).has_value());
    REQUIRE_THAT(message_of([&] { FakeQuantizer(FakeQuantizerOptions{.scheme = s, .observer = o}); }),
                 ContainsSubstring("[FakeQuantizer] " + str(o) + " does not serve " + s.str() + ": ") &&
                     ContainsSubstring(reason));
  }
  REQUIRE_FALSE(why_not_observed(Scheme::nf4(), Latest{}).has_value());
  REQUIRE_THAT(message_of([&] { search_scheme(torch::ones({2}), Scheme{.power_of_two = true}, MinMax{}); }),
               ContainsSubstring("observer must be one that searches"));
}
