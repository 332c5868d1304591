#include <rarefy/rarefy.h>
#include <torch/torch.h>

#include <cmath>
#include <filesystem>
#include <limits>
#include <utility>

#include "catch.h"
#include "parity.h"

using namespace rarefy::quantization;
using Catch::Matchers::ContainsSubstring;
namespace ops = rarefy::ops;

namespace {

const Scheme kSigned{.bits = 4};
const Scheme kUnsigned{.bits = 4, .symmetric = false};
const Scheme kWeight{.bits = 4, .narrow_range = true, .granularity = PerChannel{0}};

std::string message_of(const std::function<void()>& body) {
  try {
    body();
  } catch (const c10::Error& e) {
    return e.what_without_backtrace();
  }
  return "nothing was thrown";
}

QConfig config_of(const Observer& observer, const Observer& weight_observer, const Scheme& activation) {
  QConfig config;
  config.weight = kWeight;
  config.activation = activation;
  config.observer = observer;
  config.weight_observer = weight_observer;
  return config;
}

std::vector<float> values_of(const torch::Tensor& x) {
  const auto flat = x.detach().contiguous().view(-1);
  return {flat.data_ptr<float>(), flat.data_ptr<float>() + flat.numel()};
}

}  // namespace

TEST_CASE("A learned scale starts as in the paper and has its gradient", "[learned]") {
  torch::manual_seed(0);
  const auto x = torch::randn({6, 5}).mul(1.5).requires_grad_(), g = torch::randn({6, 5});
  FakeQuantizer quantizer(FakeQuantizerOptions{kSigned, LSQ{}});
  REQUIRE(quantizer->named_parameters().contains("scale"));
  quantizer->forward(x);
  double magnitude = 0;
  for (const float v : values_of(x)) {
    magnitude += std::fabs(v);
  }
  REQUIRE(quantizer->scale.item<double>() == Approx(2 * magnitude / 30 / std::sqrt(7.0)).epsilon(1e-6));
  {
    const torch::NoGradGuard no_grad;
    quantizer->scale.fill_(0.2);
  }
  quantizer->forward(x).backward(g);
  double total = 0;
  const auto xs = values_of(x), gs = values_of(g);
  for (size_t i = 0; i < xs.size(); ++i) {
    const double ratio = xs[i] / 0.2, r = std::nearbyint(ratio);
    total += gs[i] * (r < -8 ? -8 : r > 7 ? 7 : r - ratio);
  }
  REQUIRE(quantizer->scale.grad().item<double>() == Approx(total / std::sqrt(5.0 * 7.0)).epsilon(1e-4));
  // The sign does not count, and goes where others read the scale.
  const auto before = quantizer->forward(x);
  {
    const torch::NoGradGuard no_grad;
    quantizer->scale.neg_();
  }
  REQUIRE(quantizer->forward(x).equal(before));
  quantizer->settle();
  REQUIRE(quantizer->scale.item<float>() > 0.0f);
}

TEST_CASE("Offset, clipping value, threshold and bits have the gradients of their papers", "[learned]") {
  torch::manual_seed(1);
  const auto x = torch::randn({6, 5}).mul(1.5).requires_grad_(), g = torch::randn({6, 5});
  const auto xs = values_of(x), gs = values_of(g);
  const auto prepared = [&](const Scheme& scheme, const Observer& observer, const torch::Tensor& data) {
    FakeQuantizer quantizer(FakeQuantizerOptions{scheme, observer});
    quantizer->forward(data);
    return quantizer;
  };
  const auto set = [](FakeQuantizer& quantizer, const std::string& name, double value) {
    const torch::NoGradGuard no_grad;
    quantizer->learned.at(name).fill_(value);
  };
  const auto gradient = [](const FakeQuantizer& quantizer, const std::string& name) {
    return quantizer->learned.at(name).grad().item<double>();
  };
  SECTION("LSQ+") {
    auto quantizer = prepared(kUnsigned, LSQPlus{1.0}, x);
    set(quantizer, "scale", 0.2);
    set(quantizer, "offset", -1.0);
    quantizer->forward(x).backward(g);
    double dscale = 0, doffset = 0;
    for (size_t i = 0; i < xs.size(); ++i) {
      const double place = (xs[i] + 1.0) / 0.2;
      dscale += gs[i] * (place < 0 ? 0 : place > 15 ? 15 : std::nearbyint(place) - place);
      doffset += place < 0 || place > 15 ? gs[i] : 0;
    }
    REQUIRE(gradient(quantizer, "scale") == Approx(dscale).epsilon(1e-4));
    REQUIRE(gradient(quantizer, "offset") == Approx(doffset).epsilon(1e-4));
    quantizer->settle();
    REQUIRE(quantizer->zero_point.item<int>() == 5);
  }
  SECTION("PACT") {
    const auto y = x.detach().relu().requires_grad_();
    auto quantizer = prepared(kUnsigned, PACT{}, y);
    set(quantizer, "alpha", 1.1);
    quantizer->forward(y).backward(g);
    double dalpha = 0;
    for (size_t i = 0; i < xs.size(); ++i) {
      dalpha += xs[i] >= 1.1f ? gs[i] : 0;
    }
    REQUIRE(gradient(quantizer, "alpha") == Approx(dalpha).epsilon(1e-4));
    REQUIRE_THAT(message_of([&] { prepared(kUnsigned, PACT{}, x); }),
                 ContainsSubstring("[PACT()] the quantizer must have values that are not negative"));
  }
  SECTION("TQT") {
    auto quantizer = prepared(kSigned, TQT{}, x);
    set(quantizer, "log2_threshold", 0.4);
    quantizer->forward(x).backward(g);
    double total = 0;
    for (size_t i = 0; i < xs.size(); ++i) {
      const double ratio = xs[i] / 0.25, r = std::nearbyint(ratio);
      total += gs[i] * (r < -8 ? -8 : r > 7 ? 7 : r - ratio);
    }
    REQUIRE(gradient(quantizer, "log2_threshold") == Approx(0.25 * std::log(2.0) * total).epsilon(1e-4));
    quantizer->settle();
    REQUIRE(quantizer->scale.item<float>() == 0.25f);
  }
  SECTION("bits") {
    auto quantizer = prepared(Scheme{.bits = 6}, LearnedBits{}, x);
    set(quantizer, "bits", 3.3);
    set(quantizer, "bound", 1.5);
    quantizer->forward(x).backward(g);
    double dbits = 0, dbound = 0;
    for (size_t i = 0; i < xs.size(); ++i) {
      if (std::fabs(xs[i]) > 1.5) {
        dbound += std::copysign(gs[i], xs[i] * gs[i] < 0 ? -1.0 : 1.0);
      } else {
        const double error = std::nearbyint(xs[i] / 0.5) * 0.5 - xs[i];
        dbound += gs[i] * error / 1.5;
        dbits -= gs[i] * error * 4 * std::log(2.0) / 3;
      }
    }
    REQUIRE(gradient(quantizer, "bits") == Approx(dbits).epsilon(1e-4));
    REQUIRE(gradient(quantizer, "bound") == Approx(dbound).epsilon(1e-4));
    quantizer->settle_bits();
    REQUIRE(quantizer->options.scheme == Scheme{.bits = 3, .narrow_range = true});
    REQUIRE(quantizer->greatest_bits() == 6);
  }
}

TEST_CASE("Networks with learned grids train, are cloned, and convert to what they simulate", "[learned]") {
  const std::vector<QConfig> configs = {config_of(LSQ{}, LSQ{}, kUnsigned), config_of(LSQPlus{}, LSQ{}, kUnsigned),
                                        config_of(TQT{}, TQT{}, kSigned),
                                        config_of(LearnedBits{}, LearnedBits{}, kSigned)};
  for (const auto& config : configs) {
    torch::manual_seed(2);
    Parity model;
    prepare_qat(*model, config);
    const auto x = torch::randn({4, 2, 6, 6});
    model(x);
    std::map<std::string, torch::Tensor> before;
    for (const auto& item : model->named_parameters()) {
      before[item.key()] = item.value().detach().clone();
    }
    const auto options = torch::optim::SGDOptions(0.05).weight_decay(0.1);
    torch::optim::SGD optimizer(parameter_groups(*model, options, 0.02), torch::optim::SGDOptions(1e-3));
    REQUIRE(optimizer.param_groups().size() == 2);
    const auto& own = static_cast<torch::optim::SGDOptions&>(optimizer.param_groups()[1].options());
    REQUIRE(own.lr() == 0.02);
    REQUIRE(own.weight_decay() == 0.0);
    for (int i = 0; i < 3; ++i) {
      optimizer.zero_grad();
      model(x).square().sum().backward();
      optimizer.step();
    }
    int64_t learned = 0;
    for (const auto& item : model->named_parameters()) {
      if (item.key().find(".quant.") != std::string::npos) {
        ++learned;
        INFO(item.key());
        REQUIRE_FALSE(before.at(item.key()).equal(item.value()));
      }
    }
    REQUIRE(learned == static_cast<int64_t>(optimizer.param_groups()[1].params().size()));
    model->eval();
    const torch::NoGradGuard no_grad;
    const auto between = torch::randn({2, 4, 5, 5});
    const auto of_layer = [&] {
      const auto copy = std::dynamic_pointer_cast<rarefy::nn::Conv2dImpl>(model->plain->clone());
      return std::pair(copy->forward(between), model->plain->forward(between));
    };
    const auto simulated = model(x);
    {
      const auto [copied, given] = of_layer();
      REQUIRE(copied.equal(given));
    }
    convert(*model);
    REQUIRE(model(x).allclose(simulated, 1e-4, 1e-4));
    for (const auto& item : model->named_parameters()) {
      INFO(item.key());
      REQUIRE(item.key().find(".quant.") == std::string::npos);
    }
    const auto [copied, given] = of_layer();
    REQUIRE(copied.equal(given));
  }
}

TEST_CASE("A calibration starts a learned scale from the mean of its batches, and a file keeps it", "[learned]") {
  torch::manual_seed(3);
  Parity model;
  prepare(*model, config_of(LSQ{}, LSQ{}, kSigned));
  const auto a = torch::randn({4, 2, 6, 6}), b = torch::randn({4, 2, 6, 6}) * 3;
  calibrate(*model, [&] {
    model(a);
    model(b);
  });
  const auto* input = model->conv->quant->find("input");
  const double expected = (a.abs().mean().item<double>() + b.abs().mean().item<double>()) / std::sqrt(7.0);
  REQUIRE(input->scale.item<double>() == Approx(expected).epsilon(1e-6));
  model->train();
  model(a).sum().backward();
  REQUIRE(input->scale.grad().abs().item<double>() > 0.0);
  const auto file = (std::filesystem::temp_directory_path() / "rarefy_learned.safetensors").string();
  save_statistics(*model, file);
  Parity other;
  prepare(*other, config_of(LSQ{}, LSQ{}, kSigned));
  load_statistics(*other, file);
  std::filesystem::remove(file);
  REQUIRE(other->conv->quant->find("input")->scale.equal(input->scale));
  // What fails changes nothing.
  const auto scale = input->scale.detach().clone();
  REQUIRE_THAT(message_of([&] {
                 calibrate(*model, [&] {
                   model(b);
                   TORCH_CHECK_VALUE(false, "stopped");
                 });
               }),
               ContainsSubstring("stopped"));
  REQUIRE(input->scale.equal(scale));
}

TEST_CASE("Processes start a learned grid alike", "[learned]") {
  // The second process is played by what it would send.
  const auto mine = torch::randn({8, 4}), theirs = torch::randn({8, 4}) * 5;
  FakeQuantizer quantizer(FakeQuantizerOptions{kSigned, LSQ{}});
  const auto high = [](const torch::Tensor& x) { return 2.0 * x.abs().mean() * std::sqrt(7.0); };
  quantizer->all_reduce_max = [](torch::Tensor&) {};
  quantizer->all_reduce_sum = [](torch::Tensor&) {};
  bool finite = false;
  quantizer->all_gather = [&](const torch::Tensor& own) {
    const auto end = high(theirs);
    const auto other = finite ? torch::stack({-end, end}) : torch::full({2}, std::numeric_limits<float>::infinity());
    return std::vector<torch::Tensor>{own, other};
  };
  quantizer->forward(mine);
  REQUIRE_FALSE(quantizer->calibrated());  // one process has no range: the batch is left out in all
  REQUIRE(quantizer->skipped.item<int64_t>() == 1);
  finite = true;
  quantizer->forward(mine);
  const double expected = (mine.abs().mean().item<double>() + theirs.abs().mean().item<double>()) / std::sqrt(7.0);
  REQUIRE(quantizer->scale.item<double>() == Approx(expected).epsilon(1e-5));
}

TEST_CASE("The size of a model follows learned bits", "[learned]") {
  Parity model;
  double count = 0, in_weights = 0;
  for (const auto& item : model->named_parameters()) {
    count += static_cast<double>(item.value().numel());
    if (item.value().dim() > 1) {
      in_weights += static_cast<double>(item.value().numel());
    }
  }
  REQUIRE(model_size_bits(*model).item<double>() == 32 * count);
  REQUIRE(pact_penalty(*model).item<double>() == 0.0);
  prepare_qat(*model, config_of(LearnedBits{}, LearnedBits{}, kSigned));
  REQUIRE(model_size_bits(*model).item<double>() == 32 * (count - in_weights) + 4 * in_weights);
  auto* quantizer = model->fc->quant->find("weight");
  {
    const torch::NoGradGuard no_grad;
    quantizer->learned.at("bits").fill_(2.6);
  }
  const auto size = model_size_bits(*model);
  const auto of_fc = static_cast<double>(model->fc->weight.numel());
  REQUIRE(size.item<double>() == 32 * (count - in_weights) + 4 * in_weights - of_fc);
  size.backward();
  REQUIRE(quantizer->learned.at("bits").grad().item<double>() == of_fc);
}

TEST_CASE("Learned grids refuse what they cannot be, by name", "[learned]") {
  const auto refused = [](const Observer& observer, const Observer& of_weights, const Scheme& activation) {
    return message_of([&] { config_of(observer, of_weights, activation).validate(); });
  };
  CHECK_THAT(refused(LSQ{}, LSQPlus{}, kUnsigned),
             ContainsSubstring("LSQPlus(gradient_scale=None) is for activations"));
  CHECK_THAT(refused(PACT{}, LSQ{}, kSigned), ContainsSubstring("PACT() must have an asymmetric unsigned grid from 0"));
  CHECK_THAT(refused(LSQPlus{}, LSQ{}, kSigned), ContainsSubstring("must have an asymmetric grid"));
  CHECK_THAT(refused(LSQ{-1.0}, LSQ{}, kSigned), ContainsSubstring("gradient_scale must be finite and positive"));
  CHECK_THAT(refused(LSQ{}, LearnedBits{5}, kSigned), ContainsSubstring("no fewer than its lowest"));
  CHECK_THAT(*config_of(LSQ{}, LSQ{}, kUnsigned).why_not_integer(), ContainsSubstring("trains its grid"));
  rarefy::nn::LSTM lstm(torch::nn::LSTMOptions(3, 2));
  CHECK_THAT(message_of([&] { lstm->prepare(config_of(LSQ{}, LSQ{}, kUnsigned), MinMax{}); }),
             ContainsSubstring("[prepare] LSTM must have observers of ranges"));
  CHECK(lstm->mode() == rarefy::nn::Quantizable::Mode::floating);
}
