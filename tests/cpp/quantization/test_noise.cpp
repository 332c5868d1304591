#include <rarefy/quantization/fake_quantizer.h>
#include <rarefy/quantization/noise.h>
#include <rarefy/quantization/prepare.h>
#include <rarefy/quantization/qconfig.h>
#include <rarefy/quantization/simulate.h>
#include <torch/torch.h>

#include "catch.h"

using namespace rarefy::quantization;
using Catch::Matchers::ContainsSubstring;

TEST_CASE("noise leaves a share of the values, in training alone", "[noise]") {
  const auto x = torch::randn({40, 50});
  for (const auto& scheme : {Scheme{.bits = 4}, Scheme{.bits = 4, .granularity = PerGroup{8}}, Scheme::nf4(16),
                             Scheme::minifloat(Minifloat::e4m3(), PerChannel{0})}) {
    CAPTURE(scheme.str());
    auto noisy_scheme = scheme;
    noisy_scheme.noise = Noise{.share = 0.25};
    const auto make = [&](const Scheme& s) {
      return FakeQuantizer(FakeQuantizerOptions{.scheme = s, .observer = Latest{}, .channels = 40, .shape = {40, 50}});
    };
    auto noisy = make(noisy_scheme), plain = make(scheme);
    const auto y = noisy->forward(x), rounded = plain->forward(x);
    const auto is_rounded = y.eq(rounded), changed = rounded.ne(x);
    REQUIRE(is_rounded.logical_or(y.eq(x)).all().item<bool>());
    const auto part = is_rounded.logical_and(changed).sum().item<double>() / changed.sum().item<double>();
    REQUIRE(part == Approx(0.25).margin(0.05));
    REQUIRE_FALSE(torch::equal(noisy->forward(x), y));
    noisy->eval();
    REQUIRE(torch::equal(noisy->forward(x), rounded));
    noisy->train();
    noisy->quantize = false;
    REQUIRE(torch::equal(noisy->forward(x), x));
    noisy->drop_statistics();
    REQUIRE(noisy->options.scheme == scheme);
  }
}

TEST_CASE("uniform noise spans a step and passes the clipped gradient", "[noise]") {
  const auto x = torch::linspace(-2, 2, 4001).requires_grad_();
  const auto scale = torch::tensor({0.1f}), zero_point = torch::zeros({1}, torch::kInt32);
  const Scheme scheme{.bits = 4, .noise = Noise{.uniform = true}};
  const auto rounded = simulate(x, scale, zero_point, scheme);
  const auto y = quantization_noise(x, rounded, scale, scheme);
  const auto error = (y - x).detach() / 0.1, inside = x.detach().gt(-0.849).logical_and(x.detach().lt(0.749));
  const auto spread = error.masked_select(inside);
  REQUIRE(spread.abs().max().item<float>() <= 0.5001f);
  REQUIRE(spread.var().item<double>() == Approx(1.0 / 12).epsilon(0.06));
  REQUIRE(y.masked_select(x.gt(0.751)).eq(0.7f).all().item<bool>());
  const auto grad = torch::autograd::grad({y.sum()}, {x})[0];
  REQUIRE(grad.masked_select(inside).eq(1).all().item<bool>());
  REQUIRE(grad.masked_select(x.gt(0.751)).eq(0).all().item<bool>());
}

TEST_CASE("layers with noise are trained simulated and converted to integers", "[noise]") {
  auto config = QConfig::int8();
  config.weight->noise = Noise{.share = 0.5};
  config.activation->noise = Noise{.uniform = true};
  const auto x = torch::randn({8, 16});
  torch::nn::Sequential net(torch::nn::Linear(16, 8), torch::nn::ReLU(), torch::nn::Linear(8, 4));
  prepare_qat(*net, config);
  REQUIRE_FALSE(torch::equal(net->forward(x), net->forward(x)));
  net->eval();
  const auto expected = net->forward(x);
  convert(*net);
  REQUIRE(torch::allclose(net->forward(x), expected, 1e-4, 1e-5));
  net->train();
  REQUIRE(torch::equal(net->forward(x), net->forward(x)));
  std::ostringstream text;
  text << *net;
  REQUIRE(text.str().find("noise") == std::string::npos);
  config.execution = Execution::integer;
  torch::nn::Sequential other(torch::nn::Linear(16, 8));
  REQUIRE_THROWS_WITH(prepare_qat(*other, config), ContainsSubstring("noise is added in floating point"));
}
