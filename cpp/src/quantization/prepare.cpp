#include <fmt/ranges.h>
#include <rarefy/nn/quantizable.h>
#include <rarefy/quantization/prepare.h>
#include <torch/types.h>

namespace rarefy::quantization {
namespace {

struct Layer {
  std::string name;
  std::shared_ptr<torch::nn::Module> module;  // keeps it alive
  nn::Quantizable* layer;
};

std::vector<Layer> layers_of(const torch::nn::Module& model) {
  std::vector<Layer> layers;
  for (const auto& item : model.named_modules("", /*include_self=*/false)) {
    if (auto* layer = dynamic_cast<nn::Quantizable*>(item.value().get())) {
      layers.push_back({item.key(), item.value(), layer});
    }
  }
  return layers;
}

std::vector<Layer> prepared_layers(const char* function, const torch::nn::Module& model) {
  std::vector<Layer> prepared;
  for (auto& layer : layers_of(model)) {
    if (layer.layer->mode() == nn::Quantizable::Mode::prepared) {
      prepared.push_back(std::move(layer));
    }
  }
  TORCH_CHECK_VALUE(!prepared.empty(), "[", function,
                    "] the model must have prepared layers; call prepare_qat or prepare first");
  return prepared;
}

std::vector<std::pair<std::string, FakeQuantizerImpl*>> quantizers_of(const Layer& layer) {
  std::vector<std::pair<std::string, FakeQuantizerImpl*>> quantizers;
  for (const auto& child : layer.layer->quant_state()->named_children()) {
    quantizers.emplace_back(layer.name + ".quant." + child.key(), child.value()->as<FakeQuantizerImpl>());
  }
  return quantizers;
}

std::string join(const std::vector<std::string>& names) { return fmt::format("{}", fmt::join(names, ", ")); }

/// Checks everything before the first layer switches.
void prepare_layers(const char* function, torch::nn::Module& model, const QConfig& config,
                    const Observer& default_observer, bool quantize) {
  config.validate();
  const auto layers = layers_of(model);
  for (const auto& [pattern, override_] : config.overrides) {
    if (override_.has_value()) {
      override_->validate();
    }
    bool used = false;
    for (const auto& layer : layers) {
      used = used || matches(pattern, layer.name);
    }
    TORCH_CHECK_VALUE(used, "[", function, "] override '", pattern,
                      "' must match a rarefy::nn layer, but matches none of: ", join([&] {
                        std::vector<std::string> names;
                        for (const auto& layer : layers) {
                          names.push_back(layer.name);
                        }
                        return names;
                      }()));
  }
  std::vector<std::pair<nn::Quantizable*, LayerConfig>> todo;
  for (const auto& layer : layers) {
    const auto resolved = config.resolve(layer.name);
    if (!resolved.has_value() || !resolved->weight.has_value()) {
      continue;
    }
    TORCH_CHECK_VALUE(layer.layer->mode() == nn::Quantizable::Mode::floating, "[", function, "] layer ", layer.name,
                      " must be floating point, but is already prepared");
    todo.emplace_back(layer.layer, *resolved);
  }
  TORCH_CHECK_VALUE(!todo.empty(), "[", function,
                    "] the model must have a rarefy::nn layer that the configuration quantizes, got ", layers.size(),
                    " rarefy::nn layers and none to quantize");
  for (auto& [layer, layer_config] : todo) {
    layer->prepare(layer_config, default_observer);
    if (auto* state = layer->quant_state(); state != nullptr && !quantize) {
      for (const auto& child : state->children()) {
        auto* quantizer = child->as<FakeQuantizerImpl>();
        quantizer->quantize = std::holds_alternative<Latest>(quantizer->options.observer);
        quantizer->observe = quantizer->quantize;
      }
    }
  }
}

}  // namespace

void prepare_qat(torch::nn::Module& model, const QConfig& config) {
  prepare_layers("prepare_qat", model, config, MovingAverage{}, /*quantize=*/true);
}

void prepare(torch::nn::Module& model, const QConfig& config) {
  prepare_layers("prepare", model, config, MinMax{}, /*quantize=*/false);
}

void calibrate(torch::nn::Module& model, const std::function<void()>& run) {
  struct Switches {
    FakeQuantizerImpl* quantizer;
    bool observe, quantize;
  };
  std::vector<Switches> before;
  const auto layers = prepared_layers("calibrate", model);
  for (const auto& layer : layers) {
    for (const auto& [name, quantizer] : quantizers_of(layer)) {
      before.push_back({quantizer, quantizer->observe, quantizer->quantize});
      if (!std::holds_alternative<Latest>(quantizer->options.observer)) {
        quantizer->observe = true;
        quantizer->quantize = false;
      }
    }
  }
  const bool training = model.is_training();
  const auto restore = [&] {
    for (const auto& item : before) {
      item.quantizer->observe = item.observe;
      item.quantizer->quantize = item.quantize;
    }
    model.train(training);
  };
  model.eval();
  try {
    const torch::NoGradGuard no_grad;
    run();
    std::vector<std::string> missed;
    for (const auto& layer : layers) {
      for (const auto& [name, quantizer] : quantizers_of(layer)) {
        if (!quantizer->calibrated()) {
          missed.push_back(name);
        }
      }
    }
    TORCH_CHECK_VALUE(missed.empty(), "[calibrate] every quantizer must see data, but none reached: ", join(missed));
  } catch (...) {
    restore();
    throw;
  }
  model.train(training);
  for (const auto& item : before) {
    if (!std::holds_alternative<Latest>(item.quantizer->options.observer)) {
      item.quantizer->observe = false;
    }
    item.quantizer->quantize = true;
  }
}

void convert(torch::nn::Module& model) {
  const auto layers = prepared_layers("convert", model);
  std::vector<std::string> missed;
  for (const auto& layer : layers) {
    for (const auto& [name, quantizer] : quantizers_of(layer)) {
      // A weight is observed when it is converted.
      if (!std::holds_alternative<Latest>(quantizer->options.observer) && !quantizer->calibrated()) {
        missed.push_back(name);
      }
    }
  }
  TORCH_CHECK_VALUE(
      missed.empty(),
      "[convert] every quantizer must be calibrated (train or calibrate first), but these are not: ", join(missed));
  for (const auto& layer : layers) {
    layer.layer->convert();
  }
}

void set_state(torch::nn::Module& model, std::optional<bool> observe, std::optional<bool> quantize) {
  for (const auto& layer : prepared_layers("set_state", model)) {
    for (const auto& [name, quantizer] : quantizers_of(layer)) {
      quantizer->observe = observe.value_or(quantizer->observe);
      quantizer->quantize = quantize.value_or(quantizer->quantize);
    }
  }
}

std::string report(const torch::nn::Module& model) {
  std::string text;
  for (const auto& layer : layers_of(model)) {
    const auto mode = layer.layer->mode();
    text += fmt::format("{:<32} {:<10} {}", layer.name, layer.layer->kind(),
                        mode == nn::Quantizable::Mode::floating   ? "fp32"
                        : mode == nn::Quantizable::Mode::prepared ? "prepared"
                                                                  : "integer");
    if (mode != nn::Quantizable::Mode::floating) {
      for (const auto& [name, quantizer] : quantizers_of(layer)) {
        text += fmt::format("  {}: {}", name.substr(name.rfind('.') + 1), quantizer->options.scheme.str());
      }
    }
    text += "\n";
  }
  return text;
}

}  // namespace rarefy::quantization
