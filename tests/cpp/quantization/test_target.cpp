// Deployment targets: the table, what prepare refuses, and where it places quantizers.
#include <rarefy/rarefy.h>
#include <torch/torch.h>

#include "catch.h"

using namespace rarefy::quantization;
using Catch::Matchers::ContainsSubstring;
using rarefy::nn::Add;
using rarefy::nn::Mul;

namespace {

std::string message_of(const std::function<void()>& body) {
  try {
    body();
  } catch (const c10::Error& e) {
    return e.what_without_backtrace();
  }
  return "nothing was thrown";
}

struct BlockImpl : torch::nn::Module {
  BlockImpl()
      : conv(register_module("conv", rarefy::nn::Conv2d(torch::nn::Conv2dOptions(3, 3, 3).padding(1)))),
        add(register_module("add", Add())),
        gate(register_module("gate", Mul())),
        fc(register_module("fc", rarefy::nn::Linear(3, 5))) {}
  torch::Tensor forward(const torch::Tensor& x) {
    const auto y = torch::relu(add(conv(x), x));
    return fc(gate(y, y).mean({2, 3}));
  }
  rarefy::nn::Conv2d conv;
  Add add;
  Mul gate;
  rarefy::nn::Linear fc;
};
TORCH_MODULE(Block);

LayerConfig layer(const Scheme& activation) {
  return {.weight = Scheme{.bits = 8, .granularity = PerChannel{0}}, .activation = activation};
}

}  // namespace

TEST_CASE("every target has a profile, and other names are an error", "[target]") {
  for (const auto& name : target_names()) {
    const auto& profile = target_profile(name);
    REQUIRE(profile.name == name);
    REQUIRE(profile.oldest_opset <= profile.default_opset);
    REQUIRE_FALSE(profile.why_not(QConfig::int8(name), "Conv2d").has_value());
    REQUIRE_FALSE(profile.why_not(QConfig::int8(name), "Linear").has_value());
  }
  REQUIRE(target_names() == std::vector<std::string>{"onnxruntime", "openvino", "tensorrt", "qnn"});
  REQUIRE_THAT(
      message_of([] { target_profile("tflite"); }),
      ContainsSubstring("[target_profile] target must be one of onnxruntime, openvino, tensorrt, qnn, got 'tflite'"));
  REQUIRE_THAT(message_of([] { QConfig::int8("tflite"); }), ContainsSubstring("got 'tflite'"));
  REQUIRE_THAT(message_of([] { layer_family("RNN"); }), ContainsSubstring("[layer_family] kind must be"));
  REQUIRE(layer_family("ConvBn3d") == "conv");
}

TEST_CASE("presets have the schemes that the target executes", "[target]") {
  REQUIRE(QConfig::int8().activation->str() == "uint8 asymmetric per-tensor [0, 255]");
  REQUIRE(QConfig::int8("onnxruntime").activation->str() == "uint8 asymmetric per-tensor [0, 255]");
  REQUIRE(QConfig::int8("tensorrt").activation->str() == "int8 symmetric per-tensor [-128, 127]");
  REQUIRE(QConfig::int8("qnn", /*reduce_range=*/true).weight->str() == "int7 symmetric per-channel(axis=0) [-63, 63]");
}

TEST_CASE("a target's rules name the rule and the value", "[target]") {
  const auto asymmetric = layer({.bits = 8, .symmetric = false}), four = layer({.bits = 4, .symmetric = false});
  const auto narrow = layer({.bits = 8, .narrow_range = true}), sixteen = layer({.bits = 16, .symmetric = false});
  const auto reason = [](const char* target, const LayerConfig& config, const char* kind = "Conv2d") {
    return target_profile(target).why_not(config, kind).value_or("");
  };
  REQUIRE(
      reason("tensorrt", asymmetric) ==
      "tensorrt knows no zero points: activations must be symmetric and signed, got uint8 asymmetric per-tensor [0, 255]");
  REQUIRE(reason("onnxruntime", four) ==
          "onnxruntime executes activations of 5, 6, 7, 8 bits, got uint4 asymmetric per-tensor [0, 15]");
  REQUIRE_THAT(reason("openvino", four), ContainsSubstring("of 8 bits, got uint4"));
  REQUIRE_THAT(reason("qnn", narrow), ContainsSubstring("whole range, got int8 symmetric per-tensor [-127, 127]"));
  REQUIRE(reason("onnxruntime", narrow).empty());
  REQUIRE(reason("openvino", narrow).empty());
  REQUIRE(reason("qnn", sixteen).empty());
  REQUIRE_THAT(reason("tensorrt", sixteen), ContainsSubstring("of 8 bits, got uint16"));
  REQUIRE_THAT(
      reason("tensorrt", layer({.bits = 8}), "Embedding"),
      ContainsSubstring("tensorrt runs linear, conv, add, recurrent, conv_transpose in integers, got Embedding"));
  // No fewer bits are executed, but they can be written.
  REQUIRE_FALSE(target_profile("onnxruntime").why_not_written(*four.activation).has_value());
  REQUIRE(target_profile("qnn").adapt(asymmetric, "Linear").weight->granularity == Granularity(PerTensor{}));
  REQUIRE(target_profile("qnn").adapt(asymmetric, "Conv2d").weight->granularity == Granularity(PerChannel{0}));
}

TEST_CASE("prepare refuses what the target forbids and leaves the model as it is", "[target]") {
  const auto prepare_all = GENERATE(true, false);
  const auto run = [&](torch::nn::Module& model, const QConfig& config) {
    prepare_all ? prepare_qat(model, config) : prepare(model, config);
  };
  Block model;
  auto config = QConfig::int8();
  config.target = "tensorrt";
  REQUIRE_THAT(
      message_of([&] { run(*model, config); }),
      ContainsSubstring("layer conv must have schemes that the target executes, but tensorrt knows no zero points") &&
          ContainsSubstring("got uint8 asymmetric per-tensor [0, 255]"));
  REQUIRE(model->conv->mode() == rarefy::nn::Quantizable::Mode::floating);
  config.target = "nowhere";
  REQUIRE_THAT(message_of([&] { run(*model, config); }), ContainsSubstring("got 'nowhere'"));
  config = QConfig::int8("onnxruntime");
  config.overrides = {{"fc", layer({.bits = 4})}};
  REQUIRE_THAT(
      message_of([&] { run(*model, config); }),
      ContainsSubstring("layer fc must have schemes that the target executes, but onnxruntime executes activations"));
  config = QConfig::int8("tensorrt");
  config.overrides = {{"gate", layer({.bits = 8})}};
  REQUIRE_THAT(message_of([&] { run(*model, config); }),
               ContainsSubstring("layer gate") && ContainsSubstring("got Mul"));
}

TEST_CASE("prepare places quantizers where the target wants them", "[target]") {
  Block anywhere, residual, product;
  prepare(*anywhere, QConfig::int8());
  REQUIRE(anywhere->add->quant_state()->find("input0") != nullptr);
  REQUIRE(anywhere->conv->target.empty());

  prepare(*residual, QConfig::int8("tensorrt"));
  REQUIRE(residual->add->quant_state()->find("input0") == nullptr);
  REQUIRE(residual->add->quant_state()->find("input1") != nullptr);
  REQUIRE(residual->gate->quant_state() == nullptr);
  REQUIRE(residual->conv->target == "tensorrt");
  const auto x = torch::randn({2, 3, 5, 5});
  calibrate(*residual, [&] { residual->forward(x); });
  for (const auto& item : residual->named_buffers()) {
    if (item.key().find("zero_point") != std::string::npos) {
      REQUIRE(item.value().eq(0).all().item<bool>());
    }
  }
  const auto text = report(*residual);
  REQUIRE_THAT(text, ContainsSubstring("for tensorrt") &&
                         ContainsSubstring("kept in FP32: tensorrt does not run it in integers"));
  // A clone has the same quantizers.
  const auto add = std::dynamic_pointer_cast<rarefy::nn::AddImpl>(residual->add->clone());
  REQUIRE(add->quant_state()->find("input0") == nullptr);
  REQUIRE(torch::equal(add->forward(x, x), residual->add(x, x)));

  prepare(*product, QConfig::int8("qnn"));
  REQUIRE(product->fc->quant_state()->find("weight")->scale.numel() == 1);
  REQUIRE(product->conv->quant_state()->find("weight")->scale.numel() == 3);
}

TEST_CASE("a channel of zeros has a positive scale for every target", "[target]") {
  for (const auto& name : target_names()) {
    Block model;
    {
      const torch::NoGradGuard no_grad;
      model->conv->weight[1].zero_();
    }
    prepare(*model, QConfig::int8(name));
    calibrate(*model, [&] { model->forward(torch::zeros({1, 3, 4, 4})); });
    for (const auto& item : model->named_buffers()) {
      if (item.key().ends_with(".scale")) {
        REQUIRE(item.value().gt(0).all().item<bool>());
      }
    }
  }
}

TEST_CASE("16-bit activations and weights are simulated", "[target]") {
  auto config = QConfig::int8("qnn");
  config.activation = Scheme{.bits = 16, .symmetric = false};
  REQUIRE(config.activation->dtype() == c10::kUInt16);
  REQUIRE((Scheme{.bits = 16}.dtype() == c10::kShort));
  REQUIRE(config.why_not_integer() == "activations of 16 bits have no integer kernels");
  Block model;
  prepare(*model, config);
  const auto x = torch::randn({2, 3, 5, 5});
  calibrate(*model, [&] { model->forward(x); });
  const auto& quantizer = *model->conv->quant_state()->find("input");
  REQUIRE(quantizer.scale.item<float>() == Approx((x.max() - x.min()).item<float>() / 65535.0f));
  const auto y = model->conv->quant_state()->apply("input", x);
  REQUIRE((y - x).abs().max().item<float>() <= quantizer.scale.item<float>() * 0.51f);
  config.weight->bits = 16;
  config.activation = Scheme{};
  REQUIRE(config.why_not_integer() == "weights of 16 bits have no integer kernels");
}
