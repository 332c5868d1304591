#include "formats.h"

#include <rarefy/rarefy.h>
#include <torch/torch.h>

#include <utility>
#include <vector>

namespace {

namespace nn = rarefy::nn;
using namespace rarefy::quantization;
using torch::Tensor;

/// Images [N, 4, 6, 6] and words [N] of 9 to [N, 5].
struct NetworkImpl : torch::nn::Module {
  nn::ConvBn2d conv{nullptr};
  nn::ConvTranspose2d up{nullptr};
  nn::Embedding words{nullptr};
  nn::Linear fc1{nullptr}, fc2{nullptr};

  NetworkImpl()
      : conv(register_module("conv", nn::ConvBn2d(nn::Conv2dOptions(4, 8, 3).padding(1).bias(false)))),
        up(register_module("up", nn::ConvTranspose2d(torch::nn::ConvTranspose2dOptions(8, 6, 2).stride(2).groups(2)))),
        words(register_module("words", nn::Embedding(9, 6))),
        fc1(register_module("fc1", nn::Linear(6, 22))),
        fc2(register_module("fc2", nn::Linear(22, 5))) {
    const torch::NoGradGuard no_grad;
    for (const auto& item : named_buffers()) {
      if (item.key().ends_with("running_var")) {
        item.value().uniform_(0.5, 2.0);
      }
    }
  }
  Tensor forward(const Tensor& x, const Tensor& ids) {
    const auto image = torch::relu(up(torch::relu(conv(x)))).mean({2, 3});
    return fc2(torch::relu(fc1(image + words(ids))));
  }
};
TORCH_MODULE(Network);

const std::vector<std::pair<std::string, Scheme>>& weights() {
  static const std::vector<std::pair<std::string, Scheme>> schemes = {
      {"int12", {.bits = 12, .granularity = PerChannel{0}}},
      {"int16", {.bits = 16}},
      {"int4", {.bits = 4, .granularity = PerGroup{4, 1}}},
      {"uint4", {.bits = 4, .symmetric = false, .granularity = PerGroup{4, 1}}},
      {"uint3", {.bits = 3, .symmetric = false, .granularity = PerBlock{2, 3}}},
      {"int16-groups", {.bits = 16, .granularity = PerGroup{4, 1}}},
      {"power", {.bits = 8, .granularity = PerChannel{0}, .power_of_two = true}},
      {"random", {.bits = 4, .granularity = PerChannel{0}, .rounding = Rounding::stochastic, .seed = 3}},
      {"dynamic", {.bits = 5, .granularity = PerGroup{4, 1}, .dynamic = true}},
      {"binary", Scheme::binary(PerChannel{0})},
      {"ternary", Scheme::ternary(PerGroup{3, 1})},
      {"e4m3", Scheme::minifloat(Minifloat::e4m3(), PerChannel{0})},
      {"e5m2", Scheme::minifloat(Minifloat::e5m2(), PerGroup{4, 1})},
      {"e3m2", Scheme::minifloat(Minifloat::e3m2(), PerGroup{3, 1})},
      {"mx-e4m3", Scheme::mx(MXElement::e4m3, 4, 1)},
      {"mx-e2m1", Scheme::mx(MXElement::e2m1, 4, 1)},
      {"mx-int8", Scheme::mx(MXElement::int8, 4, 1)},
      {"nvfp4", Scheme::nvfp4(4, 1)},
      {"nf4", Scheme::nf4(4, false, 1)},
      {"nf4-double", Scheme::nf4(4, true, 1)},
      {"codebook", Scheme::codebook(7)},
      {"codebooks", Scheme::codebook(3, PerGroup{4, 1})},
  };
  return schemes;
}

const std::vector<std::pair<std::string, Scheme>>& activations() {
  static const std::vector<std::pair<std::string, Scheme>> schemes = {
      {"uint12", {.bits = 12, .symmetric = false}},
      {"power", {.bits = 8, .power_of_two = true}},
      {"dynamic", {.bits = 8, .dynamic = true}},
      {"dynamic-power", {.bits = 8, .granularity = PerGroup{4, 1}, .dynamic = true, .power_of_two = true}},
      {"token", {.bits = 8, .granularity = PerToken{}, .dynamic = true}},
      {"token-asymmetric", {.bits = 8, .symmetric = false, .granularity = PerToken{}, .dynamic = true}},
      {"e4m3", Scheme::minifloat(Minifloat::e4m3())},
      {"e5m2", Scheme::minifloat(Minifloat::e5m2())},
      {"e3m2", Scheme::minifloat(Minifloat::e3m2())},
      {"e2m1-token", Scheme::minifloat(Minifloat::e2m1(), PerToken{})},
      {"mx-e4m3", Scheme::mx(MXElement::e4m3, 4, 1)},
      {"mx-e2m3", Scheme::mx(MXElement::e2m3, 4, 1)},
      {"mx-int8", Scheme::mx(MXElement::int8, 4, 1)},
      {"nvfp4", Scheme::nvfp4(4, 1)},
  };
  return schemes;
}

void write(const std::filesystem::path& folder, const std::string& name, const QConfig& config, bool converted) {
  torch::manual_seed(1);
  Network model;
  model->eval();
  const auto x = torch::randn({5, 4, 6, 6}), ids = torch::randint(9, {5});
  const rarefy::OnnxForward run = [&](const std::vector<Tensor>& tensors) {
    return std::vector{model->forward(tensors[0], tensors[1])};
  };
  prepare(*model, config, /*strict=*/false);
  calibrate(*model, [&] { run({x, ids}); });
  if (converted) {
    convert(*model);
  }
  rarefy::export_onnx(*model, run, {x.slice(0, 0, 2), ids.slice(0, 0, 2)}, folder / ("formats-" + name + ".onnx"));
  const torch::NoGradGuard no_grad;
  rarefy::NamedTensors tensors;
  tensors.insert("input.0", x.clone());
  tensors.insert("input.1", ids.clone());
  tensors.insert("output.0", run({x, ids})[0].clone());
  rarefy::save_safetensors(tensors, folder / ("formats-" + name + ".safetensors"));
}

}  // namespace

void write_formats(const std::filesystem::path& folder) {
  for (const auto& [name, scheme] : weights()) {
    QConfig config;
    config.weight = scheme;
    write(folder, name, config, /*converted=*/false);
    if (!scheme.is_plain() || scheme.bits <= 8) {  // others have no integers to convert to
      write(folder, name + "-converted", config, /*converted=*/true);
    }
  }
  for (const auto& [name, scheme] : activations()) {
    QConfig config;
    config.weight = Scheme{.bits = 4, .granularity = PerGroup{4, 1}};
    config.activation = scheme;
    write(folder, "activation-" + name, config, /*converted=*/false);
  }
}
