#include "bags.h"

#include <rarefy/rarefy.h>
#include <torch/torch.h>

#include <algorithm>
#include <functional>
#include <utility>
#include <vector>

namespace {

namespace nn = rarefy::nn;
using namespace rarefy::quantization;
using torch::Tensor;
using torch::nn::EmbeddingBagMode;

constexpr int64_t kRows = 9, kWidth = 6, kPadding = 2;

/// Indices [N, 5] of kRows and weights [N, 5] to the bags of layers of every mode, with and without padding.
struct BagsImpl : torch::nn::Module {
  struct Bag {
    std::string name;
    nn::EmbeddingBag layer{nullptr};
    torch::nn::EmbeddingBag plain{nullptr};
    bool weighted = false;
  };
  std::vector<Bag> bags;

  BagsImpl() {
    const std::vector<std::pair<std::string, EmbeddingBagMode>> modes = {
        {"sum", torch::kSum}, {"mean", torch::kMean}, {"max", torch::kMax}};
    for (const auto& [name, mode] : modes) {
      for (const bool padded : {false, true}) {
        auto options = torch::nn::EmbeddingBagOptions(kRows, kWidth).mode(mode);
        if (padded) {
          options.padding_idx(kPadding);
        }
        const auto full = name + (padded ? "_padded" : "");
        bags.push_back({full, register_module(full, nn::EmbeddingBag(options))});
        bags.push_back({"plain_" + full, nullptr, register_module("plain_" + full, torch::nn::EmbeddingBag(options))});
        if (name == "sum") {
          for (const size_t from : {bags.size() - 2, bags.size() - 1}) {
            auto weighted = bags[from];
            weighted.name += "_weighted";
            weighted.weighted = true;
            bags.push_back(weighted);
          }
        }
      }
    }
    for (auto& item : named_parameters()) {  // so that a padding row that is not left out shows
      const torch::NoGradGuard no_grad;
      item.value().normal_();
    }
  }

  std::vector<std::string> names() const {
    std::vector<std::string> out;
    for (const auto& bag : bags) {
      out.push_back(bag.name);
    }
    out.insert(out.end(), {"turned", "own_offsets"});
    return out;
  }
  std::vector<Tensor> forward(const Tensor& ids, const Tensor& weights) {
    std::vector<Tensor> out;
    for (auto& bag : bags) {
      const auto given = bag.weighted ? weights : Tensor();
      out.push_back(bag.layer ? bag.layer->forward(ids, {}, given) : bag.plain->forward(ids, {}, given));
    }
    // As many bags for every batch, of sizes that follow it.
    out.push_back(find("mean_padded").layer->forward(ids.t()));
    // Offsets of bags of one size.
    const auto begins = torch::arange(0, ids.numel(), ids.size(1), torch::kLong);
    out.push_back(find("plain_mean_padded").plain->forward(ids.flatten(), begins));
    return out;
  }

 private:
  Bag& find(const std::string& name) {
    return *std::find_if(bags.begin(), bags.end(), [&](const Bag& bag) { return bag.name == name; });
  }
};
TORCH_MODULE(Bags);

/// [N, 20] to [N, 5]: adapters over a weight [out, in].
struct AdaptedImpl : torch::nn::Module {
  nn::Linear before{nullptr}, after{nullptr};
  nn::LoRALinear adapted{nullptr};

  AdaptedImpl(nn::LoRABase base, int64_t in, int64_t out)
      : before(register_module("before", nn::Linear(20, in))),
        after(register_module("after", nn::Linear(out, 5))),
        adapted(register_module("adapted", nn::LoRALinear(*torch::nn::Linear(in, out),
                                                          nn::LoRAOptions{.rank = 4, .alpha = 6.0, .base = base}))) {
    const torch::NoGradGuard no_grad;
    adapted->lora_b.normal_(0, 0.1);  // zeros when they begin
  }
  Tensor forward(const Tensor& x) { return after(torch::relu(adapted(torch::relu(before(x))))); }
};
TORCH_MODULE(Adapted);

/// How a model is before it is written.
struct State {
  std::string name;
  std::optional<QConfig> config = QConfig::int8();
  bool converted = false;
  std::string target = "onnxruntime";
  std::optional<int64_t> opset = std::nullopt;
};

QConfig weights(const Scheme& scheme) {
  QConfig config;
  config.weight = scheme;
  return config;
}

/// The model as `state` says, written; what it gives then goes to the tensors.
void write(torch::nn::Module& model, const rarefy::OnnxForward& run, const std::vector<Tensor>& inputs,
           const State& state, const std::filesystem::path& stem, std::vector<std::string> names,
           rarefy::NamedTensors& tensors) {
  model.eval();
  if (state.config.has_value()) {
    prepare(model, *state.config, /*strict=*/false);
    calibrate(model, [&] { run(inputs); });
  }
  if (state.converted) {
    convert(model);
  }
  std::vector<Tensor> example;
  for (size_t i = 0; i < inputs.size(); ++i) {
    tensors.insert("input." + std::to_string(i), inputs[i].clone());
    example.push_back(inputs[i].slice(0, 0, 2));
  }
  rarefy::OnnxOptions options;
  options.target = state.target;
  options.opset = state.opset;
  options.output_names = names;
  rarefy::export_onnx(model, run, example, stem.string() + ".onnx", options);
  const torch::NoGradGuard no_grad;
  const auto outputs = run(inputs);
  for (size_t i = 0; i < outputs.size(); ++i) {
    tensors.insert(names[i], outputs[i].clone());
  }
  rarefy::save_safetensors(tensors, stem.string() + ".safetensors");
}

}  // namespace

void write_bags(const std::filesystem::path& folder) {
  const Scheme one_scale, groups{.bits = 4, .granularity = PerGroup{4, 1}},
      wide{.bits = 12, .granularity = PerChannel{0}};
  const std::vector<State> states = {
      {.name = "float", .config = std::nullopt},
      {.name = "float-13", .config = std::nullopt, .opset = 13},
      {.name = "rows"},
      {.name = "rows-13", .opset = 13},
      {.name = "rows-openvino", .config = QConfig::int8("openvino"), .target = "openvino"},
      {.name = "rows-converted", .converted = true},
      {.name = "one-scale", .config = weights(one_scale)},
      {.name = "one-scale-converted", .config = weights(one_scale), .converted = true},
      {.name = "wide", .config = weights(wide)},
      {.name = "groups", .config = weights(groups)},
      {.name = "groups-packed", .config = weights(groups), .converted = true},
      {.name = "nf4-packed", .config = weights(Scheme::nf4(4, true, 1)), .converted = true},
      {.name = "e4m3-packed",
       .config = weights(Scheme::minifloat(Minifloat::e4m3(), PerChannel{0})),
       .converted = true},
  };
  for (const auto& state : states) {
    torch::manual_seed(3);
    Bags model;
    const auto ids = torch::randint(kRows, {7, 5});
    ids[0].copy_(torch::tensor({int64_t{1}, kPadding, int64_t{3}, kPadding, int64_t{1}}));
    ids[1].fill_(kPadding);
    rarefy::NamedTensors tensors;
    write(
        *model, [&](const std::vector<Tensor>& x) { return model->forward(x[0], x[1]); }, {ids, torch::randn({7, 5})},
        state, folder / ("bags-" + state.name), model->names(), tensors);
  }
}

void write_adapters(const std::filesystem::path& folder) {
  const std::vector<std::pair<std::string, nn::LoRABase>> bases = {
      {"nf4", nn::LoRABase::nf4}, {"int8", nn::LoRABase::int8}, {"floating", nn::LoRABase::floating}};
  const std::vector<State> states = {{.name = "float", .config = std::nullopt},
                                     {.name = "float-13", .config = std::nullopt, .opset = 13},
                                     {.name = "prepared"},
                                     {.name = "converted", .converted = true},
                                     {.name = "openvino", .config = QConfig::int8("openvino"), .target = "openvino"}};
  for (const auto& [base, value] : bases) {
    for (const auto& state : states) {
      torch::manual_seed(4);
      // Rows that end within a block, of an odd and of an even length; more than one block of scales, the last one full or not.
      const bool even = state.target == "openvino";
      Adapted model(value, even ? 250 : 131, even ? 128 : 96);
      rarefy::NamedTensors tensors;
      tensors.insert("weight", model->adapted->base_weight().detach().clone());
      write(
          *model, [&](const std::vector<Tensor>& x) { return std::vector{model->forward(x[0])}; },
          {torch::randn({7, 20})}, state, folder / ("adapters-" + base + "-" + state.name), {"output"}, tensors);
    }
  }
}
