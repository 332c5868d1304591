#include <rarefy/rarefy.h>
#include <torch/torch.h>

#include "catch.h"

namespace rnn = rarefy::nn;
using Catch::Matchers::ContainsSubstring;

namespace {

std::string message_of(const std::function<void()>& body) {
  try {
    body();
  } catch (const c10::Error& e) {
    return e.what_without_backtrace();
  }
  return "nothing was thrown";
}

}  // namespace

TEST_CASE("adapters over a frozen base", "[nn][lora]") {
  torch::manual_seed(0);
  const auto base = GENERATE(rnn::LoRABase::floating, rnn::LoRABase::int8, rnn::LoRABase::nf4);
  torch::nn::Linear linear(70, 9);
  rnn::LoRALinear layer(*linear, rnn::LoRAOptions{4, 6.0, 0, base});
  const auto x = torch::randn({5, 70});
  const auto weight = layer->base_weight().detach();
  const auto distance = (weight - linear->weight).abs().max().item<float>();
  const auto largest = linear->weight.abs().max().item<float>();
  REQUIRE(distance <= largest * (base == rnn::LoRABase::floating ? 0 : base == rnn::LoRABase::int8 ? 0.005 : 0.2));
  REQUIRE(torch::allclose(layer(x), torch::linear(x, weight, linear->bias), 1e-5, 1e-5));
  {
    const torch::NoGradGuard no_grad;
    torch::nn::init::normal_(layer->lora_b);
  }
  const auto before = layer(x);
  const auto expected = torch::linear(x, weight, linear->bias) + 1.5 * x.mm(layer->lora_a.t()).mm(layer->lora_b.t());
  REQUIRE(torch::allclose(before, expected, 1e-4, 1e-4));
  before.sum().backward();
  REQUIRE(layer->lora_a.grad().defined());
  for (const auto& item : layer->named_parameters()) {
    REQUIRE(item.value().requires_grad() == (item.key().rfind("lora_", 0) == 0));
  }
  layer->merge();
  REQUIRE(torch::allclose(layer(x), before, 1e-4, 1e-4));
  REQUIRE(torch::equal(layer->merged()(x), layer(x)));
  layer->unmerge();
  REQUIRE(torch::equal(layer(x), before));
}

TEST_CASE("NF4 takes little more than four bits", "[nn][lora]") {
  torch::manual_seed(0);
  const auto packed = rarefy::ops::pack_nf4(torch::randn({256, 1024}));
  const auto bytes = packed.codes.nbytes() + packed.scale_codes.nbytes() + packed.scale_steps.nbytes() + 4;
  REQUIRE(bytes * 8 < 256 * 1024 * 4.13);
}

TEST_CASE("adapters say what does not fit", "[nn][lora]") {
  torch::nn::Linear linear(6, 4);
  REQUIRE_THAT(message_of([&] { rnn::LoRALinear(*linear, rnn::LoRAOptions{5}); }),
               ContainsSubstring("[LoRALinear] rank must be within [1, 4], got 5"));
  REQUIRE_THAT(message_of([&] { rnn::LoRALinear(*linear, rnn::LoRAOptions{2, std::nullopt, 1.0}); }),
               ContainsSubstring("[LoRALinear] dropout must be within [0, 1), got 1"));
}
