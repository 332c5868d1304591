#include <rarefy/rarefy.h>
#include <torch/torch.h>

#include <filesystem>
#include <functional>
#include <sstream>
#include <string>

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

template <typename To, typename From>
void copy_parameters(To& to, const From& from) {
  const torch::NoGradGuard no_grad;
  for (const auto& item : from->named_parameters()) {
    to->named_parameters()[item.key()].copy_(item.value());
  }
}

/// A model that holds one attention and a head.
struct NetImpl : torch::nn::Module {
  explicit NetImpl(const rnn::MultiheadAttentionOptions& options)
      : attention(register_module("attention", rnn::MultiheadAttention(options))),
        fc(register_module("fc", rnn::Linear(options.embed_dim(), 3))) {}
  torch::Tensor forward(const torch::Tensor& x, const torch::Tensor& memory) {
    return fc(std::get<0>(attention->forward(x, memory, memory)));
  }
  torch::Tensor forward(const torch::Tensor& x) { return forward(x, x); }
  rnn::MultiheadAttention attention;
  rnn::Linear fc;
};
TORCH_MODULE(Net);

rnn::MultiheadAttentionOptions batched(int64_t width, int64_t heads) {
  return rnn::MultiheadAttentionOptions(width, heads).batch_first(true);
}

}  // namespace

TEST_CASE("attention is torch's until prepared", "[nn][attention]") {
  torch::manual_seed(0);
  using Options = torch::nn::MultiheadAttentionOptions;
  const auto query = torch::randn({5, 3, 8});
  for (const auto& options : {Options(8, 2), Options(8, 2).bias(false), Options(8, 4).kdim(6).vdim(6),
                              Options(8, 2).add_bias_kv(true), Options(8, 2).add_zero_attn(true)}) {
    torch::nn::MultiheadAttention reference(options);
    rnn::MultiheadAttention ours{rnn::MultiheadAttentionOptions(options)};
    REQUIRE(ours->named_parameters().keys() == reference->named_parameters().keys());
    copy_parameters(ours, reference);
    const auto key = torch::randn({4, 3, options.kdim()}), value = torch::randn({4, 3, options.vdim()});
    auto mask = torch::randn({5, 4});
    auto padding = torch::zeros({3, 4}, torch::kBool);
    padding[1][2] = true;
    for (const auto& [given_mask, given_padding] :
         {std::pair(torch::Tensor(), torch::Tensor()), {mask, torch::Tensor()}, {mask, padding}}) {
      const auto [y, weights] = ours->forward(query, key, value, given_padding, true, given_mask);
      const auto [expected, shown] = reference->forward(query, key, value, given_padding, true, given_mask);
      REQUIRE(torch::allclose(y, expected, 1e-5, 1e-5));
      REQUIRE(torch::allclose(weights, shown, 1e-5, 1e-5));
    }
    const auto all = std::get<1>(ours->forward(query, key, value, {}, true, {}, /*average_attn_weights=*/false));
    REQUIRE(all.dim() == 4);
    REQUIRE(torch::allclose(all.mean(1), std::get<1>(ours->forward(query, key, value)), 1e-5, 1e-6));
    REQUIRE(!std::get<1>(ours->forward(query, key, value, {}, /*need_weights=*/false)).defined());
    const auto one = std::get<0>(ours->forward(query.select(1, 0), key.select(1, 0), value.select(1, 0)));
    REQUIRE(torch::allclose(one, std::get<0>(ours->forward(query, key, value)).select(1, 0), 1e-5, 1e-5));
  }
  rnn::MultiheadAttention first(batched(8, 2)), second(8, 2);
  copy_parameters(second, first);
  const auto x = torch::randn({3, 5, 8}), t = x.transpose(0, 1);
  REQUIRE(torch::allclose(std::get<0>(first->forward(x, x, x)), std::get<0>(second->forward(t, t, t)).transpose(0, 1),
                          1e-5, 1e-6));
  // A mask of truth values, for every head its own.
  const auto truth = torch::eye(5, torch::kBool).expand({6, 5, 5});
  const auto numbers = torch::zeros({5, 5}).masked_fill(truth[0], -std::numeric_limits<double>::infinity());
  REQUIRE(torch::allclose(std::get<0>(first->forward(x, x, x, {}, true, truth)),
                          std::get<0>(first->forward(x, x, x, {}, true, numbers)), 1e-5, 1e-6));
}

TEST_CASE("an attention trains, converts and comes back from a folder", "[nn][attention]") {
  torch::manual_seed(0);
  const bool is_packed = GENERATE(true, false);
  const auto options = is_packed ? batched(8, 2).add_bias_kv(true) : batched(8, 2).kdim(6).vdim(6).bias(false);
  Net model(options);
  prepare_qat(*model, QConfig::int8());
  const auto x = torch::randn({3, 5, 8}), memory = torch::randn({3, 4, is_packed ? 8 : 6});
  torch::optim::SGD optimizer(model->parameters(), 0.01);
  for (int i = 0; i < 3; ++i) {
    optimizer.zero_grad();
    model->forward(x, memory).square().mean().backward();
    for (const auto& item : model->named_parameters()) {
      INFO(item.key());
      REQUIRE(item.value().grad().defined());
    }
    optimizer.step();
  }
  model->eval();
  REQUIRE_THAT(report(*model), ContainsSubstring("attention") && ContainsSubstring("attention.out_proj") &&
                                   ContainsSubstring("weight_query"));
  const torch::NoGradGuard no_grad;
  const auto expected = model->forward(x, memory);
  convert(*model);
  REQUIRE(model->attention->q_proj_weight.scalar_type() == torch::kInt8);
  REQUIRE(!model->attention->in_proj_weight.defined());
  REQUIRE(model->parameters().empty());
  const auto got = model->forward(x, memory);
  REQUIRE(torch::allclose(got, expected, 1e-3, 2e-2));

  const auto folder = std::filesystem::temp_directory_path() / "rarefy_attention";
  std::filesystem::remove_all(folder);
  save_quantized(*model, folder);
  Net again(options);
  load_quantized(*again, folder);
  REQUIRE(torch::equal(again->forward(x, memory), got));
  Net other(batched(16, 2));
  REQUIRE_THAT(message_of([&] { load_quantized(*other, folder); }),
               ContainsSubstring("layer attention must have the model's shape"));
  REQUIRE(other->attention->mode() == rnn::Quantizable::Mode::floating);
  Net without(rnn::MultiheadAttentionOptions(options).bias(!options.bias()));
  REQUIRE_THAT(message_of([&] { load_quantized(*without, folder); }), ContainsSubstring("layer attention"));
  std::filesystem::remove_all(folder);
  const auto clone = std::dynamic_pointer_cast<rnn::MultiheadAttentionImpl>(model->attention->clone());
  REQUIRE(torch::equal(std::get<0>(clone->forward(x, memory, memory)),
                       std::get<0>(model->attention->forward(x, memory, memory))));
}

TEST_CASE("integer training of attention follows simulated training", "[nn][attention]") {
  torch::manual_seed(0);
  Net integer(batched(8, 2)), simulated(batched(8, 2));
  copy_parameters(simulated, integer);
  auto config = QConfig::int8();
  config.execution = Execution::integer;
  prepare_qat(*integer, config);
  config.execution = Execution::simulated;
  prepare_qat(*simulated, config);
  const auto x = torch::randn({3, 5, 8});
  const auto a = integer->forward(x), b = simulated->forward(x);
  REQUIRE(torch::allclose(a, b, 1e-3, 2e-2));
  a.square().sum().backward();
  b.square().sum().backward();
  for (const auto& item : integer->named_parameters()) {
    INFO(item.key());
    REQUIRE(torch::allclose(item.value().grad(), simulated->named_parameters()[item.key()].grad(), 5e-2, 5e-2));
  }
}

TEST_CASE("the output projection has the configuration of its attention", "[nn][attention]") {
  torch::manual_seed(0);
  const auto mode = [](const rnn::Linear& layer) { return layer->mode(); };
  Net kept(batched(8, 2));
  auto config = QConfig::int8();
  config.overrides.emplace_back("attention", std::nullopt);
  prepare_qat(*kept, config);
  REQUIRE(kept->attention->mode() == rnn::Quantizable::Mode::floating);
  REQUIRE(mode(kept->attention->out_proj) == rnn::Quantizable::Mode::floating);
  REQUIRE_THAT(report(*kept), ContainsSubstring("attention, to which it belongs, stays in FP32"));
  Net half(batched(8, 2));
  config = QConfig::int8();
  config.overrides.emplace_back("*.out_proj", std::nullopt);
  prepare_qat(*half, config);
  REQUIRE(half->attention->mode() == rnn::Quantizable::Mode::prepared);
  REQUIRE(mode(half->attention->out_proj) == rnn::Quantizable::Mode::floating);
  const auto x = torch::randn({2, 5, 8});
  half->forward(x);
  half->eval();
  convert(*half);
  const auto folder = std::filesystem::temp_directory_path() / "rarefy_attention_half";
  std::filesystem::remove_all(folder);
  save_quantized(*half, folder);
  Net again(batched(8, 2));
  load_quantized(*again, folder);
  REQUIRE(torch::equal(again->forward(x), half->forward(x)));
  std::filesystem::remove_all(folder);
  Net ends(batched(8, 2));
  config = QConfig::int8();
  config.first_last_fp32 = true;
  config.overrides.emplace_back("fc", QConfig::int8());
  prepare_qat(*ends, config);
  REQUIRE(ends->attention->mode() == rnn::Quantizable::Mode::floating);
  REQUIRE(mode(ends->attention->out_proj) == rnn::Quantizable::Mode::floating);
}

TEST_CASE("an attention refuses what it cannot compute", "[nn][attention]") {
  REQUIRE_THAT(message_of([] { rnn::MultiheadAttention(10, 3); }),
               ContainsSubstring("[MultiheadAttention] num_heads must divide embed_dim where head_dim is not given"));
  REQUIRE_THAT(message_of([] { rnn::MultiheadAttention(rnn::MultiheadAttentionOptions(10, 3).head_dim(0)); }),
               ContainsSubstring("[MultiheadAttention] sizes must be at least 1"));
  rnn::MultiheadAttention attention(8, 2);
  const auto x = torch::randn({5, 3, 8});
  REQUIRE_THAT(message_of([&] { attention->forward(x, x[0], x); }),
               ContainsSubstring("[MultiheadAttention] query, key and value must all have 3 dimensions"));
  REQUIRE_THAT(message_of([&] { attention->forward(x, x, x, {}, true, torch::zeros({4, 5})); }),
               ContainsSubstring("[MultiheadAttention] attn_mask must have shape [5, 5] or [6, 5, 5], got [4, 5]"));
  REQUIRE_THAT(message_of([&] { attention->forward(x, x, x, torch::zeros({2, 5})); }),
               ContainsSubstring("[MultiheadAttention] key_padding_mask must have shape [3, 5], got [2, 5]"));
  REQUIRE_THROWS_AS(attention->forward(x, x, x, torch::zeros({3, 5}, torch::kInt)), c10::TypeError);
  torch::nn::Sequential model(torch::nn::Linear(8, 8));
  model->push_back("attention", torch::nn::MultiheadAttention(8, 2));
  REQUIRE_THAT(message_of([&] { prepare_qat(*model, QConfig::int8()); }),
               ContainsSubstring("attention (it cannot be replaced: make it a rarefy::nn::MultiheadAttention)"));
  std::ostringstream text;
  text << *attention;
  REQUIRE_THAT(text.str(), ContainsSubstring("rarefy::nn::MultiheadAttention(embed_dim=8, num_heads=2"));
}

TEST_CASE("heads of any width, of weights alone and of other formats", "[nn][attention]") {
  torch::manual_seed(0);
  const auto options = batched(8, 3).head_dim(2).v_head_dim(5).scale(0.3);
  Net model(options);
  REQUIRE(model->attention->out_proj->weight.sizes() == at::IntArrayRef({8, 15}));
  const auto x = torch::randn({2, 5, 8});
  const auto expected = model->forward(x);
  QConfig weights;
  weights.weight = QConfig::int8().weight;
  prepare(*model, weights);
  model->eval();
  const auto simulated = model->forward(x);
  convert(*model);
  REQUIRE(torch::allclose(model->forward(x), simulated, 1e-5, 1e-6));
  REQUIRE(torch::allclose(simulated, expected, 0.1, 0.1));
  Net groups(options);
  QConfig four;
  four.weight = Scheme{.bits = 4, .granularity = PerGroup{4, 1}};
  prepare(*groups, four);
  groups->eval();
  const auto before = groups->forward(x);
  convert(*groups);
  REQUIRE(torch::equal(groups->forward(x), before));
}
