// A calibration does everything once, and gives what doing it for every batch gives.
#include <rarefy/rarefy.h>
#include <torch/torch.h>

#include "catch.h"

using namespace rarefy::quantization;
namespace rnn = rarefy::nn;

namespace {

struct SharedImpl : torch::nn::Module {
  rnn::ConvBn2d conv{nullptr};
  rnn::ConvTranspose2d up{nullptr};
  rnn::LSTM lstm{nullptr};
  rnn::Linear query{nullptr}, key{nullptr};

  SharedImpl()
      : conv(register_module("conv", rnn::ConvBn2d(2, 4, 3))),
        up(register_module("up", rnn::ConvTranspose2d(rnn::ConvTransposeOptions<2>(4, 4, 2).groups(2)))),
        lstm(register_module("lstm", rnn::LSTM(rnn::LSTMOptions(4, 3)))),
        query(register_module("query", rnn::Linear(3, 5))),
        key(register_module("key", rnn::Linear(3, 5))) {}

  torch::Tensor forward(const torch::Tensor& x) {
    const auto y = up(torch::relu(conv(x))).flatten(2).permute({2, 0, 1}).contiguous();
    const auto steps = std::get<0>(lstm(y));
    return query(steps) * key(steps);
  }
};
TORCH_MODULE(Shared);

std::vector<torch::Tensor> batches() {
  torch::manual_seed(1);
  return {torch::randn({2, 2, 6, 6}), torch::randn({3, 2, 6, 6}) * 2, torch::randn({1, 2, 6, 6})};
}

Shared prepared(const Observer& observer, const Observer& weight_observer) {
  torch::manual_seed(0);
  Shared net;
  net->conv->bn->running_var.uniform_(0.5, 2.0);
  auto config = QConfig::int8();
  config.observer = observer;
  config.weight_observer = weight_observer;
  prepare(*net, config);
  net->eval();
  return net;
}

std::vector<std::shared_ptr<FakeQuantizerImpl>> activations(Shared& net) {
  std::vector<std::shared_ptr<FakeQuantizerImpl>> found;
  for (const auto& module : net->modules(false)) {
    auto quantizer = std::dynamic_pointer_cast<FakeQuantizerImpl>(module);
    if (quantizer != nullptr && !quantizer->is_weight()) {
      found.push_back(quantizer);
    }
  }
  return found;
}

/// Every quantizer observes every tensor, every weight is folded and rounded for every batch.
void calibrate_slowly(Shared& net) {
  const torch::NoGradGuard no_grad;
  for (const auto& quantizer : activations(net)) {
    quantizer->observe = true;
    quantizer->quantize = false;
  }
  for (const auto& batch : batches()) {
    net(batch);
  }
  for (const auto& quantizer : activations(net)) {
    REQUIRE(quantizer->calibrated());
    quantizer->observe = false;
    quantizer->quantize = true;
  }
}

}  // namespace

TEST_CASE("a calibration gives what observing and rounding for every batch gives", "[observers]") {
  const std::vector<Observer> observers = {MinMax{},     MovingAverage{}, Histogram{.bins = 256},
                                           Percentile{}, SQNR{},          MeanNoOutliers{}};
  for (const auto& observer : observers) {
    for (const Observer& weight_observer : {Observer(Latest{}), Observer(MSE{}), Observer(HalfQuadratic{})}) {
      INFO(str(observer) << ", " << str(weight_observer));
      auto fast = prepared(observer, weight_observer), slow = prepared(observer, weight_observer);
      calibrate(*fast, [&] {
        for (const auto& batch : batches()) {
          fast(batch);
        }
      });
      calibrate_slowly(slow);
      const auto got = fast->named_buffers(), expected = slow->named_buffers();
      REQUIRE(got.size() == expected.size());
      for (const auto& item : expected) {
        INFO(item.key());
        REQUIRE(got[item.key()].equal(item.value()));
      }
      const auto x = batches()[0];
      REQUIRE(fast(x).equal(slow(x)));
      REQUIRE_FALSE(fast->conv->quant->keeps());
      REQUIRE(fast->query->quant->find("input")->observed_once == nullptr);
    }
  }
}

TEST_CASE("a weight that is written to during a calibration is rounded again", "[observers]") {
  auto fast = prepared(MinMax{}, Latest{}), slow = prepared(MinMax{}, Latest{});
  const auto data = batches();
  const auto run = [&](Shared& net) {
    const torch::NoGradGuard no_grad;
    net(data[0]);
    net->conv->weight.mul_(3);
    net(data[0]);
  };
  calibrate(*fast, [&] { run(fast); });
  for (const auto& quantizer : activations(slow)) {
    quantizer->observe = true;
    quantizer->quantize = false;
  }
  run(slow);
  REQUIRE(fast->up->quant->find("input")->max_val.equal(slow->up->quant->find("input")->max_val));
}

TEST_CASE("a calibration that fails keeps nothing", "[observers]") {
  auto net = prepared(MinMax{}, Latest{});
  REQUIRE_THROWS(calibrate(*net, [&] {
    net(batches()[0]);
    TORCH_CHECK_VALUE(false, "stop");
  }));
  REQUIRE_FALSE(net->conv->quant->keeps());
  REQUIRE(net->query->quant->find("input")->observed_once == nullptr);
}
