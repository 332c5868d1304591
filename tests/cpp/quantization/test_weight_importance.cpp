#include <rarefy/rarefy.h>
#include <torch/torch.h>

#include "catch.h"

using namespace rarefy::quantization;
using Catch::Matchers::ContainsSubstring;
namespace rnn = rarefy::nn;

namespace {

struct NetImpl : torch::nn::Module {
  rnn::ConvBn2d conv{nullptr};
  rnn::Conv2d grouped{nullptr};
  rnn::ConvTranspose2d up{nullptr};
  rnn::Linear fc{nullptr};

  NetImpl()
      : conv(register_module("conv", rnn::ConvBn2d(3, 4, 3))),
        grouped(register_module("grouped", rnn::Conv2d(rnn::ConvOptions<2>(4, 6, 1).groups(2)))),
        up(register_module("up", rnn::ConvTranspose2d(rnn::ConvTransposeOptions<2>(6, 4, 2).stride(2).groups(2)))),
        fc(register_module("fc", rnn::Linear(4, 2))) {}

  torch::Tensor forward(const torch::Tensor& x) {
    inputs.clear();
    const auto note = [&](const torch::Tensor& t) { return inputs.emplace_back(t); };
    return fc(note(up(note(grouped(note(conv(note(x)))))).mean({2, 3})));
  }

  std::vector<torch::Tensor> inputs;  // of conv, grouped, up; then what is averaged for fc
};
TORCH_MODULE(Net);

Net prepared(const Observer& weight_observer = MSE{}) {
  torch::manual_seed(0);
  Net net;
  auto config = QConfig::int8();
  config.weight->bits = 3;  // narrow enough for the ends of ranges to matter
  config.weight_observer = weight_observer;
  prepare(*net, config);
  return net;
}

template <typename Layer>
FakeQuantizerImpl& weight_of(Layer& layer) {
  return *layer->quant->find("weight");
}

std::string message_of(const std::function<void()>& body) {
  try {
    body();
  } catch (const c10::Error& e) {
    return e.what_without_backtrace();
  }
  return "nothing was thrown";
}

}  // namespace

TEST_CASE("importance is the mean squared input of each channel", "[observers]") {
  auto net = prepared();
  net->train();
  const auto loudness = torch::tensor({0.1f, 1.0f, 5.0f}).view({1, 3, 1, 1});
  const auto first = torch::randn({2, 3, 8, 8}) * loudness, second = torch::randn({5, 3, 8, 8}) * 2 * loudness;
  std::vector<torch::Tensor> grouped_inputs, up_inputs;
  collect_importance(*net, [&] {
    for (const auto& x : {first, second}) {
      net(x);
      grouped_inputs.push_back(net->inputs[1]);
      up_inputs.push_back(net->inputs[2]);
    }
  });
  const auto mean = [](const torch::Tensor& x) { return x.to(torch::kFloat64).square().mean({0, 2, 3}); };
  REQUIRE(torch::allclose(weight_of(net->conv).importance.to(torch::kFloat64),
                          mean(torch::cat({first, second})).view({1, 3, 1, 1})));
  const auto grouped = mean(torch::cat(grouped_inputs));
  const auto& of_grouped = weight_of(net->grouped).importance;
  REQUIRE(of_grouped.sizes() == at::IntArrayRef({6, 2, 1, 1}));
  for (int64_t out = 0; out < 6; ++out) {
    for (int64_t in = 0; in < 2; ++in) {
      REQUIRE(of_grouped[out][in].item<float>() == Approx(grouped[out / 3 * 2 + in].item<double>()));
    }
  }
  const auto up = mean(torch::cat(up_inputs));
  const auto& of_up = weight_of(net->up).importance;  // by channel: [in / groups, out, ...]
  REQUIRE(of_up.sizes() == at::IntArrayRef({3, 4, 1, 1}));
  for (int64_t in = 0; in < 3; ++in) {
    for (int64_t out = 0; out < 4; ++out) {
      REQUIRE(of_up[in][out].item<float>() == Approx(up[out / 2 * 3 + in].item<double>()));
    }
  }
  REQUIRE(weight_of(net->fc).importance.sizes() == at::IntArrayRef({1, 4}));
  // As before: modes, switches. And the searches read it.
  REQUIRE(net->is_training());
  REQUIRE(weight_of(net->fc).quantize);
  REQUIRE_FALSE(net->conv->quant->find("input")->observe);
  calibrate(*net, [&] { net(first); });
  auto plain = prepared();
  calibrate(*plain, [&] { plain(first); });
  REQUIRE_FALSE(weight_of(net->conv).scale.equal(weight_of(plain->conv).scale));
}

TEST_CASE("importance is the mean squared gradient", "[observers]") {
  auto net = prepared();
  const std::vector<torch::Tensor> data = {torch::randn({2, 3, 8, 8}), torch::randn({3, 3, 8, 8})};
  size_t next = 0;
  collect_gradient_importance(*net, [&] { return net(data.at(next++)).square().sum(); }, 2);
  REQUIRE(next == 2);
  REQUIRE_FALSE(net->fc->weight.grad().defined());
  // By hand, in floating point.
  net->eval();
  torch::Tensor expected = torch::zeros({2, 4});
  for (const auto& module : net->modules(false)) {
    if (auto quantizer = std::dynamic_pointer_cast<FakeQuantizerImpl>(module)) {
      quantizer->observe = quantizer->quantize = false;
    }
  }
  for (const auto& x : data) {
    const auto gradient = torch::autograd::grad({net(x).square().sum()}, {net->fc->weight})[0];
    expected += gradient.square() / 2;
  }
  REQUIRE(torch::allclose(weight_of(net->fc).importance, expected, 1e-4, 1e-6));
  REQUIRE(weight_of(net->conv).importance.sizes() == at::IntArrayRef({4, 3, 3, 3}));
  REQUIRE(weight_of(net->up).importance.sizes() == at::IntArrayRef({3, 4, 2, 2}));
}

TEST_CASE("importance that cannot be collected leaves everything as it was", "[observers]") {
  Net floating;
  REQUIRE_THAT(message_of([&] { collect_importance(*floating, [] {}); }),
               ContainsSubstring("the model must have prepared layers"));
  auto without = prepared(Latest{});
  REQUIRE_THAT(message_of([&] { collect_importance(*without, [] {}); }),
               ContainsSubstring("whose weight has the observer MSE, but has none"));
  auto net = prepared();
  REQUIRE_THAT(message_of([&] { collect_importance(*net, [] {}); }),
               ContainsSubstring("none reached: conv.quant.weight, grouped.quant.weight, up.quant.weight, "
                                 "fc.quant.weight"));
  REQUIRE_THAT(message_of([&] { collect_importance(*net, [&] { net(torch::full({1, 3, 8, 8}, NAN)); }); }),
               ContainsSubstring("data must be finite"));
  REQUIRE_THAT(
      message_of([&] { collect_gradient_importance(*net, [&] { return net(torch::ones({1, 3, 8, 8})); }, 1); }),
      ContainsSubstring("loss must give one number, got shape [1, 2]"));
  REQUIRE_THAT(message_of([&] { collect_gradient_importance(*net, [] { return torch::ones({}); }, 0); }),
               ContainsSubstring("batches must be at least 1, got 0"));
  REQUIRE_FALSE(weight_of(net->fc).importance.defined());
  REQUIRE(weight_of(net->fc).watch == nullptr);
  REQUIRE(net->fc->quant->watch == nullptr);
  REQUIRE(weight_of(net->fc).quantize);
}
