#include <rarefy/rarefy.h>
#include <torch/torch.h>

#include <filesystem>
#include <functional>
#include <string>
#include <utility>
#include <vector>

#include "catch.h"

using namespace rarefy::quantization;
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

std::vector<Scheme> weight_schemes() {
  return {Scheme{.bits = 4, .granularity = PerGroup{16, 1}},
          Scheme{.bits = 4, .symmetric = false, .granularity = PerBlock{4, 5}},
          Scheme{.bits = 3, .granularity = PerGroup{7, 0}},
          Scheme{.bits = 10, .granularity = PerBlock{8, 8}},
          Scheme::minifloat(Minifloat::e4m3(), PerChannel{0}),
          Scheme::mx(MXElement::e2m1, 32, 1),
          Scheme::nvfp4(16, 1),
          Scheme::nf4(64, true, 1),
          Scheme::codebook(6, PerGroup{16, 1}),
          Scheme::binary(PerChannel{0}),
          Scheme::ternary(PerChannel{0})};
}

/// A layer of every kind that packs its weight.
struct NetImpl : torch::nn::Module {
  rnn::Embedding words{nullptr};
  rnn::ConvBn1d conv{nullptr};
  rnn::ConvTranspose1d up{nullptr};
  rnn::EmbeddingBag bag{nullptr};
  rnn::Linear hidden{nullptr}, out{nullptr};

  NetImpl()
      : words(register_module("words", rnn::Embedding(30, 64))),
        conv(register_module("conv", rnn::ConvBn1d(64, 32, 3))),
        up(register_module("up", rnn::ConvTranspose1d(rnn::ConvTranspose1dOptions(32, 32, 2).stride(2).groups(2)))),
        bag(register_module("bag",
                            rnn::EmbeddingBag(rnn::EmbeddingBagOptions(30, 64).mode(torch::kMean).padding_idx(2)))),
        hidden(register_module("hidden", rnn::Linear(32, 64))),
        out(register_module("out", rnn::Linear(rnn::LinearOptions(64, 5).bias(false)))) {
    hidden->set_relu(true);
  }
  torch::Tensor forward(const torch::Tensor& ids) {
    const auto x = up(torch::relu(conv(words(ids).transpose(1, 2)))).mean(2);
    return out(hidden(x) + bag(ids));
  }
};
TORCH_MODULE(Net);

QConfig weight_only(const Scheme& scheme) {
  QConfig config;
  config.weight = scheme;
  return config;
}

}  // namespace

TEST_CASE("packed weights multiply as the numbers that they stand for", "[packed]") {
  torch::manual_seed(0);
  for (const auto& scheme : weight_schemes()) {
    INFO(scheme.str());
    const auto weight = torch::randn({300, 513}), bias = torch::randn({300});
    const auto parts = quantize_to(weight, scheme);
    const auto numbers = dequantize(parts);
    REQUIRE(torch::equal(dequantize_packed(parts), numbers));
    for (const auto rows : {1, 5, 100}) {
      const auto x = torch::randn({rows, 513});
      REQUIRE(torch::allclose(packed_linear(x, parts, bias), torch::linear(x, numbers, bias), 1e-5, 1e-4));
    }
    const auto ids = torch::randint(300, {4, 3});
    REQUIRE(torch::equal(packed_embedding(ids, parts), torch::embedding(numbers, ids)));
  }
  const auto parts = quantize_to(torch::randn({6, 40}), weight_schemes()[0]);
  auto x = torch::randn({2, 40}, torch::requires_grad());
  packed_linear(x, parts).sum().backward();
  REQUIRE(torch::allclose(x.grad(), dequantize(parts).sum(0).expand({2, 40}), 1e-5, 1e-5));
  REQUIRE_THAT(message_of([&] { packed_linear(torch::randn({2, 41}), parts); }),
               ContainsSubstring("[packed_linear] x must have 40 features, got shape [2, 41]"));
  REQUIRE_THAT(message_of([&] { packed_embedding(torch::tensor({6}), parts); }),
               ContainsSubstring("[packed_embedding] indices must be within [0, 6), got 6"));
  auto broken = parts;
  broken.tensors.erase("scale");
  REQUIRE_THAT(message_of([&] { packed_linear(x, broken); }), ContainsSubstring("must have 'scale', got none"));
}

TEST_CASE("layers with packed weights equal their simulated selves", "[packed]") {
  torch::manual_seed(0);
  const auto ids = torch::randint(30, {4, 6});
  const auto folder = std::filesystem::temp_directory_path() / "rarefy_packed";
  for (const auto& config : {weight_only(Scheme{.bits = 4, .granularity = PerGroup{16, 1}}),
                             weight_only(Scheme::nf4(64, true, 1)), QConfig::fp8(), QConfig::nvfp4()}) {
    INFO(config.weight->str());
    Net model;
    model->eval();
    prepare(*model, config);
    if (config.activation.has_value()) {
      calibrate(*model, [&] { model->forward(ids); });
    }
    model->eval();
    const torch::NoGradGuard no_grad;
    const auto expected = model->forward(ids);
    convert(*model);
    REQUIRE(torch::equal(model->forward(ids), expected));
    REQUIRE(model->parameters().empty());
    REQUIRE(model->hidden->packed_weight() != nullptr);
    REQUIRE(!model->hidden->weight.defined());
    REQUIRE(model->named_buffers().contains("hidden.weight_data"));
    REQUIRE(!model->named_buffers().contains("hidden.quant.weight.scale"));
    REQUIRE_THAT(report(*model), ContainsSubstring("packed") && ContainsSubstring("bits per value"));

    std::filesystem::remove_all(folder);
    save_quantized(*model, folder);
    Net again;
    load_quantized(*again, folder);
    REQUIRE(torch::equal(again->forward(ids), expected));
    const auto clone = std::dynamic_pointer_cast<rnn::LinearImpl>(model->hidden->clone());
    const auto x = torch::randn({2, 32});
    REQUIRE(torch::equal(clone->forward(x), model->hidden->forward(x)));
    Net other;
    prepare(*other, config);
    if (config.activation.has_value()) {
      calibrate(*other, [&] { other->forward(ids); });
    }
    convert(*other);
    rarefy::save_safetensors(*model, folder / "state");
    rarefy::load_safetensors(*other, folder / "state");
    other->eval();
    REQUIRE(torch::equal(other->forward(ids), expected));
    std::filesystem::remove_all(folder);
  }
}

TEST_CASE("a packed layer takes as much memory as its format", "[packed]") {
  torch::manual_seed(0);
  torch::nn::Sequential model(rnn::Linear(512, 512), rnn::Linear(512, 512));
  for (const auto& [scheme, bits] :
       {std::pair(Scheme{.bits = 4, .granularity = PerGroup{128, 1}}, 4.25), {Scheme::nf4(64, true, 1), 4.13}}) {
    torch::nn::Sequential copy(rnn::Linear(512, 512), rnn::Linear(512, 512));
    prepare(*copy, weight_only(scheme));
    convert(*copy);
    int64_t bytes = 0;
    for (const auto& buffer : copy->buffers()) {
      bytes += static_cast<int64_t>(buffer.nbytes());
    }
    REQUIRE(static_cast<double>(bytes) < 2 * 512 * 512 * (bits + 0.1) / 8);
  }
}

TEST_CASE("a folder with packed weights is checked", "[packed]") {
  torch::manual_seed(0);
  const auto folder = std::filesystem::temp_directory_path() / "rarefy_packed_checks";
  std::filesystem::remove_all(folder);
  torch::nn::Sequential model(rnn::Linear(32, 16), rnn::Linear(16, 4));
  prepare(*model, weight_only(Scheme{.bits = 4, .granularity = PerGroup{16, 1}}));
  convert(*model);
  save_quantized(*model, folder);
  torch::nn::Sequential wide(rnn::Linear(48, 16), rnn::Linear(16, 4));
  REQUIRE_THAT(message_of([&] { load_quantized(*wide, folder); }),
               ContainsSubstring("the weight of layer 0 must have the model's shape [16, 48], got [16, 32]"));
  torch::nn::Sequential without(rnn::Linear(rnn::LinearOptions(32, 16).bias(false)), rnn::Linear(16, 4));
  REQUIRE_THAT(message_of([&] { load_quantized(*without, folder); }),
               ContainsSubstring("layer 0 must have no bias, as in the model"));
  const torch::NoGradGuard no_grad;
  for (auto& buffer : model->named_buffers()) {
    if (buffer.key() == "0.weight_scale") {
      buffer.value().fill_(std::numeric_limits<double>::quiet_NaN());
    }
  }
  REQUIRE_THAT(message_of([&] { save_quantized(*model, folder); }),
               ContainsSubstring("layer 0: weight_scale must be finite, but is not"));
  std::filesystem::remove_all(folder);
}
