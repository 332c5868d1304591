#include <rarefy/quantization/fake_quantizer.h>
#include <rarefy/quantization/packed.h>
#include <rarefy/quantization/prepare.h>
#include <rarefy/quantization/qconfig.h>
#include <rarefy/quantization/scheme.h>
#include <rarefy/quantization/simulate.h>
#include <torch/torch.h>

#include "catch.h"

using namespace rarefy::quantization;
using Catch::Matchers::ContainsSubstring;

namespace {

std::vector<Scheme> every_kind() {
  return {Scheme{},
          Scheme{.bits = 4, .granularity = PerGroup{3, -1}},
          Scheme{.bits = 4, .symmetric = false, .granularity = PerBlock{2, 3}},
          Scheme{.granularity = PerToken{}, .dynamic = true},
          Scheme{.bits = 12, .power_of_two = true},
          Scheme{.rounding = Rounding::stochastic, .seed = 5, .straight_through = StraightThrough::pass},
          Scheme{.bits = 4, .noise = Noise{.share = 0.1}},
          Scheme{.bits = 4, .noise = Noise{.share = 0.5, .uniform = true}},
          Scheme::minifloat(Minifloat::e4m3(), PerChannel{0}),
          Scheme::minifloat(Minifloat{3, 4, 5, Specials::ieee, false}),
          Scheme::mx(MXElement::e2m3, 32, 1),
          Scheme::mx(MXElement::int8),
          Scheme::nvfp4(),
          Scheme::nf4(64, true),
          Scheme::codebook(5),
          Scheme::binary(PerChannel{0}),
          Scheme::ternary()};
}

template <typename Call>
std::string refusal(const Call& call) {
  try {
    call();
  } catch (const c10::ValueError& e) {
    return e.what_without_backtrace();
  }
  return "";
}

}  // namespace

TEST_CASE("schemes survive JSON and say what they are", "[scheme]") {
  std::vector<std::string> texts;
  for (auto scheme : every_kind()) {
    scheme.validate();
    scheme.is_signed = scheme.signed_range();
    REQUIRE(Scheme::from_json(scheme.to_json()) == scheme);
    for (const auto& text : texts) {
      REQUIRE(text != scheme.str());
    }
    texts.push_back(scheme.str());
  }
  REQUIRE(texts[8] == "e4m3 per-channel(axis=0)");
  REQUIRE(Scheme::mx(MXElement::e4m3).str() == "mx e4m3 per-group(32, axis=-1)");
}

TEST_CASE("impossible schemes are refused by name", "[scheme]") {
  auto nf4 = Scheme::nf4();
  nf4.symmetric = false;
  REQUIRE_THAT(refusal([&] { nf4.validate(); }), ContainsSubstring("[Scheme] nf4 has no zero point"));
  REQUIRE_THAT(refusal([] { Scheme{.bits = 8, .format = NF4{}}.validate(); }),
               ContainsSubstring("bits must be 4 for nf4, got 8"));
  REQUIRE_THAT(refusal([] { Scheme{.granularity = PerToken{}}.validate(); }),
               ContainsSubstring("dynamic must be true"));
  REQUIRE_THAT(refusal([] { (void)Scheme::nvfp4().qmin(); }),
               ContainsSubstring("[Scheme] qmin is of a range of integers, which nvfp4 has not"));
  REQUIRE_THAT(refusal([] { (void)Scheme::binary().dtype(); }), ContainsSubstring("which binary has not"));
  REQUIRE_THAT(refusal([] { Scheme::from_json(R"({"colour": 1})"); }),
               ContainsSubstring("must not have the key 'colour'"));
  REQUIRE_THAT(QConfig::fp8().why_not_integer().value_or(""), ContainsSubstring("e4m3 has no integer kernels"));
  for (const auto& config : {QConfig::int8_dynamic(), QConfig::int4_weight_only(), QConfig::fp8(), QConfig::mxfp8(),
                             QConfig::nvfp4(), QConfig::nf4()}) {
    config.validate();
  }
}

TEST_CASE("parts of a tensor give what simulation gives", "[scheme]") {
  torch::manual_seed(3);
  const auto x = torch::randn({6, 37}) * 3;
  for (const auto& scheme : every_kind()) {
    if (scheme.rounding == Rounding::stochastic) {
      continue;
    }
    CAPTURE(scheme.str());
    const auto parts = quantize_to(x, scheme);
    torch::Tensor scale = torch::ones({1}), zero_point = torch::zeros({1}, torch::kInt32);
    if (std::holds_alternative<Codebook>(scheme.format)) {
      scale = parts.tensors.at("codebook");
    } else if (scheme.needs_range()) {
      std::tie(scale, zero_point) = scheme_qparams(x, scheme);
    }
    REQUIRE(torch::equal(dequantize(parts), simulate(x, scale, zero_point, scheme)));
  }
}

TEST_CASE("fake quantizers execute formats with buffers of the right shape", "[scheme]") {
  torch::manual_seed(4);
  const auto w = torch::randn({6, 20});
  FakeQuantizer groups(FakeQuantizerOptions{
      .scheme = Scheme{.bits = 4, .granularity = PerGroup{8}}, .observer = Latest{}, .shape = {6, 20}});
  const auto y = groups->forward(w);
  REQUIRE(groups->scale.sizes() == torch::IntArrayRef({6, 3}));
  REQUIRE(torch::equal(y, simulate(w, groups->scale, groups->zero_point, groups->options.scheme)));
  FakeQuantizer clusters(FakeQuantizerOptions{
      .scheme = Scheme::codebook(4, PerChannel{0}), .observer = Latest{}, .channels = 6, .shape = {6, 20}});
  REQUIRE(clusters->codebook.sizes() == torch::IntArrayRef({6, 4}));
  clusters->forward(w);
  const auto before = clusters->codebook.clone();
  clusters->forward(w + 1);
  REQUIRE(torch::equal(clusters->codebook, before));
  FakeQuantizer fp8(FakeQuantizerOptions{.scheme = Scheme::minifloat(Minifloat::e4m3())});
  fp8->forward(torch::tensor({1.0f, -44.8f}));
  REQUIRE(fp8->scale.item<float>() == 44.8f / 448.0f);
  FakeQuantizer token(FakeQuantizerOptions{.scheme = Scheme{.granularity = PerToken{}, .dynamic = true}});
  token->eval();
  REQUIRE(token->calibrated());
  REQUIRE(token->forward(w).sizes() == w.sizes());
}

TEST_CASE("layers with formats train, are calibrated and compute the same after convert", "[scheme]") {
  torch::manual_seed(5);
  const auto x = torch::randn({8, 32});
  for (const auto& config : {QConfig::int8_dynamic(), QConfig::int4_weight_only(16), QConfig::fp8(), QConfig::mxfp8(),
                             QConfig::nvfp4(), QConfig::nf4()}) {
    torch::nn::Sequential net(torch::nn::Linear(32, 16), torch::nn::ReLU(), torch::nn::Linear(16, 4));
    CAPTURE(config.weight->str());
    const auto exact = net->forward(x).detach();
    prepare(*net, config);
    if (config.activation.has_value()) {
      calibrate(*net, [&] { net->forward(x); });
    }
    net->eval();
    const auto y = net->forward(x);
    const auto error = ((y - exact).norm() / exact.norm()).item<double>();
    REQUIRE(error > 0.0);
    REQUIRE(error < 0.4);
    y.sum().backward();
    REQUIRE(net->parameters()[0].grad().abs().sum().item<double>() > 0.0);
    REQUIRE_THAT(report(*net), ContainsSubstring(config.weight->str()));
    convert(*net);
    REQUIRE(torch::equal(net->forward(x), y));
    REQUIRE_THAT(report(*net), ContainsSubstring(config.weight->is_plain() ? "prepared" : "packed"));
  }
}
