#include <rarefy/rarefy.h>
#include <torch/torch.h>

#include "catch.h"

using namespace rarefy::quantization;
namespace rnn = rarefy::nn;
using Catch::Matchers::ContainsSubstring;

namespace {

torch::Tensor on_grid(const torch::Tensor& x, const FakeQuantizerImpl& q) {
  return ((x / q.scale).round() + q.zero_point).clamp(0, 255).sub(q.zero_point) * q.scale;
}

/// Every boundary between two linear layers, and attention of two heads.
struct NetImpl : torch::nn::Module {
  rnn::Linear first = register_module("first", rnn::Linear(6, 8));
  rnn::LayerNorm layer_norm = register_module("layer_norm", rnn::LayerNorm(torch::nn::LayerNormOptions({8})));
  rnn::GroupNorm group_norm = register_module("group_norm", rnn::GroupNorm(2, 8));
  rnn::RMSNorm rms_norm = register_module("rms_norm", rnn::RMSNorm(std::vector<int64_t>{8}));
  rnn::GELU gelu = register_module("gelu", rnn::GELU(torch::nn::GELUOptions().approximate("tanh")));
  rnn::SiLU silu = register_module("silu", rnn::SiLU());
  rnn::Hardswish hardswish = register_module("hardswish", rnn::Hardswish());
  rnn::SDPA attention = register_module("attention", rnn::SDPA());
  rnn::Softmax softmax = register_module("softmax", rnn::Softmax(-1));
  rnn::Linear last = register_module("last", rnn::Linear(8, 3));

  torch::Tensor forward(const torch::Tensor& x) {
    auto y = gelu(layer_norm(first(x)));
    y = silu(group_norm(y.transpose(1, 2)).transpose(1, 2));
    const auto heads = hardswish(rms_norm(y)).unflatten(-1, {2, 4}).transpose(1, 2);
    y = attention(heads, heads, heads).transpose(1, 2).flatten(2);
    return last(softmax(y));
  }
};
TORCH_MODULE(Net);

}  // namespace

TEST_CASE("boundaries hand on values on a grid", "[nn][boundaries]") {
  torch::manual_seed(0);
  Net net;
  const auto x = torch::randn({2, 5, 6});
  const auto before = net(x);
  prepare_qat(*net, QConfig::int8());
  REQUIRE(net->layer_norm->quant->find("input") == nullptr);
  net(x).sum().backward();
  REQUIRE(net->layer_norm->weight.grad().defined());
  net->eval();
  const torch::NoGradGuard no_grad;
  REQUIRE(torch::allclose(net(x), before, 0.2, 0.1));
  const auto h = net->first(x);
  REQUIRE(torch::allclose(net->layer_norm(h),
                          on_grid(torch::layer_norm(h, {8}), *net->layer_norm->quant->find("output")), 1e-5, 1e-6));
  const auto q = torch::randn({1, 2, 3, 4});
  const auto& quant = *net->attention->quant;
  const auto scores = on_grid(q, *quant.find("query")).matmul(on_grid(q, *quant.find("key")).transpose(-2, -1)) * 0.5;
  const auto expected =
      on_grid(torch::softmax(scores, -1), *quant.find("probabilities")).matmul(on_grid(q, *quant.find("value")));
  REQUIRE(torch::allclose(net->attention(q, q, q), expected, 1e-5, 1e-5));

  const auto simulated = net(x);
  convert(*net, [&] { return std::vector{net->forward(x)}; });
  REQUIRE(torch::allclose(net(x), simulated, 1e-3, 1e-3));
  REQUIRE_THAT(report(*net), ContainsSubstring("gives floats: there is no integer product of two activations"));
  const auto folder = std::filesystem::temp_directory_path() / "rarefy_boundaries";
  save_quantized(*net, folder);
  Net again;
  load_quantized(*again, folder);
  REQUIRE(torch::equal(again(x), net(x)));
  std::filesystem::remove_all(folder);
}

TEST_CASE("a target that computes boundaries on integers quantizes their inputs", "[nn][boundaries]") {
  Net net;
  prepare_qat(*net, QConfig::int8("qnn"));
  REQUIRE(net->gelu->quant->find("input") != nullptr);
  REQUIRE(net->gelu->quant->find("output") != nullptr);
}

TEST_CASE("bags of embeddings equal torch's on the grid", "[nn][embedding_bag]") {
  torch::manual_seed(0);
  rnn::EmbeddingBag bag(torch::nn::EmbeddingBagOptions(9, 4).mode(torch::kMean).padding_idx(2));
  torch::nn::ModuleList model(bag);
  prepare_qat(*model, QConfig::int8());
  const auto ids = torch::tensor({1, 2, 3, 3, 2, 2, 8}), offsets = torch::tensor({0, 4, 6});
  const auto y = bag(ids, offsets);
  const auto& q = *bag->quant->find("weight");
  const auto table = (bag->weight.detach() / q.scale.unsqueeze(1)).round().clamp(-127, 127) * q.scale.unsqueeze(1);
  const auto expected = torch::stack({(table[1] + 2 * table[3]) / 3, torch::zeros({4}), table[8]});
  REQUIRE(torch::allclose(y, expected, 1e-5, 1e-6));
  convert(*model);
  REQUIRE(bag->weight.scalar_type() == torch::kInt8);
  REQUIRE(torch::equal(bag(ids, offsets), y));
}
