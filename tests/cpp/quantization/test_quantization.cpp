#include <rarefy/rarefy.h>
#include <torch/torch.h>

#include <algorithm>
#include <fstream>

#include "catch.h"
#include "parity.h"

using namespace rarefy::quantization;
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

std::vector<std::string> keys(const torch::nn::Module& model, const std::string& prefix) {
  std::vector<std::string> names;
  for (const auto& item : model.named_parameters()) {
    names.push_back(prefix + item.key());
  }
  for (const auto& item : model.named_buffers()) {
    names.push_back(prefix + item.key());
  }
  return names;
}

/// round_half_even(x / s) + z, clamped, back to float: plain loops.
torch::Tensor on_grid(const torch::Tensor& x, FakeQuantizerImpl& q) {
  auto out = x.detach().clone().contiguous();
  const auto channels = q.scale.numel();
  const auto inner = channels == 1 ? out.numel() : out.numel() / channels;
  for (int64_t i = 0; i < out.numel(); ++i) {
    const float s = q.scale[i / inner % channels].item<float>();
    const auto z = static_cast<float>(q.zero_point[i / inner % channels].item<int32_t>());
    float integer = std::nearbyint(out.data_ptr<float>()[i] / s) + z;
    integer =
        std::clamp(integer, static_cast<float>(q.options.scheme.qmin()), static_cast<float>(q.options.scheme.qmax()));
    out.data_ptr<float>()[i] = (integer - z) * s;
  }
  return out;
}

}  // namespace

TEST_CASE("a scheme knows its range", "[quantization]") {
  REQUIRE(Scheme{}.qmin() == -128);
  REQUIRE(Scheme{.narrow_range = true}.qmin() == -127);
  REQUIRE(Scheme{.symmetric = false}.qmax() == 255);
  REQUIRE(Scheme{.bits = 4, .symmetric = false, .is_signed = true}.qmin() == -8);
  REQUIRE(Scheme{.granularity = PerChannel{1}}.axis() == 1);
  REQUIRE_THAT(message_of([] { Scheme{.bits = 17}.validate(); }),
               ContainsSubstring("[Scheme] bits must be in 2..16 for integers (1 bit is Binary), got 17"));
}

TEST_CASE("name patterns", "[quantization]") {
  REQUIRE(matches("*", "a.b"));
  REQUIRE(matches("a.*", "a.b.c"));
  REQUIRE(matches("*.b", "a.b"));
  REQUIRE(matches("?c1", "fc1"));
  REQUIRE(!matches("fc", "fc1"));
  REQUIRE(!matches("a?", "a"));
  REQUIRE(matches("a*c*e", "abcde"));
}

TEST_CASE("state keys are those of Python", "[quantization]") {
  std::ifstream file(RAREFY_TESTS_DIR "/state_dict_keys.txt");
  std::vector<std::string> expected{std::istream_iterator<std::string>(file), {}};
  EveryLayer model;
  prepare_qat(*model, QConfig::int8());
  auto found = keys(*model, "prepared:");
  model(torch::randint(7, {2, 5}), torch::randn({2, 2, 4, 6, 6}));
  convert(*model);
  for (auto& key : keys(*model, "converted:")) {
    found.push_back(key);
  }
  std::sort(found.begin(), found.end());
  std::sort(expected.begin(), expected.end());
  REQUIRE(found == expected);
}

TEST_CASE("a layer is floating point until prepared", "[quantization]") {
  torch::manual_seed(0);
  rarefy::nn::Linear layer(5, 4);
  torch::nn::Linear reference(5, 4);
  {
    const torch::NoGradGuard no_grad;
    reference->weight.copy_(layer->weight);
    reference->bias.copy_(layer->bias);
  }
  const auto x = torch::randn({3, 5});
  REQUIRE(torch::equal(layer(x), reference(x)));
  rarefy::nn::ConvBn2d conv(2, 3, 3);
  const auto image = torch::randn({4, 2, 6, 6});
  auto bn = torch::nn::BatchNorm2d(3);
  REQUIRE(torch::allclose(conv(image), bn(torch::conv2d(image, conv->weight))));
}

TEST_CASE("a prepared layer equals the formula", "[quantization]") {
  torch::manual_seed(0);
  const auto execution = GENERATE(Execution::simulated, Execution::integer);
  torch::nn::Sequential model(rarefy::nn::Linear(5, 4));
  auto config = QConfig::int8();
  config.execution = execution;
  prepare_qat(*model, config);
  const auto x = torch::randn({3, 5});
  model->forward(x);
  model->eval();
  auto* layer = model->ptr(0)->as<rarefy::nn::LinearImpl>();
  const auto expected = torch::linear(on_grid(x, *layer->quant->find("input")),
                                      on_grid(layer->weight, *layer->quant->find("weight")), layer->bias);
  if (execution == Execution::simulated) {
    REQUIRE(torch::equal(model->forward(x), expected));
  } else {
    REQUIRE(torch::allclose(model->forward(x), expected, 0.0, 1e-6));
  }
}

TEST_CASE("training with quantization keeps an existing optimizer and learns", "[quantization]") {
  torch::manual_seed(0);
  torch::nn::Sequential model(rarefy::nn::Linear(4, 32), torch::nn::ReLU(), rarefy::nn::Linear(32, 3));
  torch::optim::Adam optimizer(model->parameters(), 0.01);
  prepare_qat(*model, QConfig::int8());
  const auto x = torch::randn({256, 4});
  const auto y = (x.select(1, 0) > 0).to(torch::kLong) + (x.select(1, 1) > 0).to(torch::kLong);
  for (int step = 0; step < 150; ++step) {
    optimizer.zero_grad();
    torch::nn::functional::cross_entropy(model->forward(x), y).backward();
    optimizer.step();
  }
  model->eval();
  const auto prepared = model->forward(x);
  REQUIRE((prepared.argmax(1) == y).to(torch::kFloat).mean().item<float>() > 0.95f);
  convert(*model);
  REQUIRE(model->ptr(0)->as<rarefy::nn::LinearImpl>()->weight.scalar_type() == torch::kChar);
  const torch::NoGradGuard no_grad;
  REQUIRE(torch::allclose(model->forward(x), prepared, 1e-4, 1e-4));
  REQUIRE(model->parameters().empty());
}

TEST_CASE("post-training quantization", "[quantization]") {
  torch::manual_seed(0);
  Parity model;
  model(torch::randn({16, 2, 6, 6}));
  model->eval();
  const auto x = torch::randn({8, 2, 6, 6});
  const auto before = model(x);
  prepare(*model, QConfig::int8());
  REQUIRE_THAT(
      message_of([&] { convert(*model); }),
      ContainsSubstring("[convert] every quantizer must be calibrated") && ContainsSubstring("add.quant.input0"));
  REQUIRE_THAT(message_of([&] { calibrate(*model, [] {}); }),
               ContainsSubstring("[calibrate] every quantizer must see data, but none reached: conv.quant.input"));
  calibrate(*model, [&] { model(x); });
  REQUIRE(!model->is_training());
  const auto prepared = model(x);
  REQUIRE((prepared - before).abs().max().item<float>() < 0.05f * before.abs().max().item<float>());
  convert(*model);
  REQUIRE(torch::allclose(model(x), prepared, 1e-4, 1e-5));
}

TEST_CASE("prepare refuses and changes nothing", "[quantization]") {
  Parity model;
  auto config = QConfig::int8();
  config.overrides = {{"nothing*", std::nullopt}};
  REQUIRE_THAT(message_of([&] { prepare_qat(*model, config); }),
               ContainsSubstring("[prepare_qat] override 'nothing*' must match a rarefy::nn layer"));
  REQUIRE(model->fc->quant_state() == nullptr);
  torch::nn::Sequential empty(torch::nn::ReLU{});
  REQUIRE_THAT(message_of([&] { prepare_qat(*empty, QConfig::int8()); }),
               ContainsSubstring("[prepare_qat] the model must have a rarefy::nn layer"));
  config.overrides = {{"fc", std::nullopt}};
  prepare_qat(*model, config);
  REQUIRE(model->fc->quant_state() == nullptr);
  REQUIRE(model->conv->quant_state() != nullptr);
  REQUIRE_THAT(message_of([&] { prepare_qat(*model, config); }), ContainsSubstring("is already prepared"));
  REQUIRE_THAT(message_of([&] { model->conv->prepare(config, MinMax{}); }), ContainsSubstring("already prepared"));
  REQUIRE_THAT(message_of([] { rarefy::nn::Conv2d(rarefy::nn::Conv2dOptions(3, 4, 3).groups(2)); }),
               ContainsSubstring("[Conv2d] groups must divide the channels, got 2 groups for 3 and 4 channels"));
  REQUIRE_THAT(report(*model), ContainsSubstring("fc") && ContainsSubstring("fp32") && ContainsSubstring("prepared"));
}

TEST_CASE("a prepared and a converted layer can be cloned and saved", "[quantization]") {
  torch::manual_seed(0);
  torch::nn::Sequential model(rarefy::nn::ConvBn2d(2, 4, 3), torch::nn::ReLU(), rarefy::nn::Conv2d(4, 3, 1));
  prepare_qat(*model, QConfig::int8());
  const auto x = torch::randn({2, 2, 6, 6});
  model->forward(x);
  model->eval();
  const auto expected = model->forward(x);
  const auto copy = std::dynamic_pointer_cast<torch::nn::SequentialImpl>(model->clone());
  REQUIRE(torch::equal(copy->forward(x), expected));

  std::stringstream stream;
  torch::save(model, stream);
  torch::nn::Sequential fresh(rarefy::nn::ConvBn2d(2, 4, 3), torch::nn::ReLU(), rarefy::nn::Conv2d(4, 3, 1));
  prepare_qat(*fresh, QConfig::int8());
  torch::load(fresh, stream);
  fresh->eval();
  REQUIRE(torch::equal(fresh->forward(x), expected));

  const torch::NoGradGuard no_grad;
  convert(*model);
  const auto integer = model->forward(x);
  const auto converted_copy = std::dynamic_pointer_cast<torch::nn::SequentialImpl>(model->clone());
  REQUIRE(torch::equal(converted_copy->forward(x), integer));
}
