#include <fmt/ranges.h>
#include <rarefy/masks.h>
#include <rarefy/nn/add.h>
#include <rarefy/nn/boundaries.h>
#include <rarefy/nn/quantizable.h>
#include <rarefy/quantization/prepare.h>
#include <rarefy/quantization/target.h>
#include <torch/types.h>

#include <algorithm>
#include <map>
#include <set>
#include <string_view>

#include "quantization/link.h"
#include "quantization/observed_once.h"
#include "quantization/replace.h"

namespace rarefy::quantization {
namespace {

struct Layer {
  std::string name;
  std::shared_ptr<torch::nn::Module> module;  // keeps it alive
  nn::Quantizable* layer;
};

std::vector<Layer> layers_of(const torch::nn::Module& model) {
  std::vector<Layer> layers;
  std::set<const nn::Quantizable*> seen;  // a layer that the model holds twice is one layer
  for (const auto& item : model.named_modules("", /*include_self=*/false)) {
    if (auto* layer = dynamic_cast<nn::Quantizable*>(item.value().get());
        layer != nullptr && seen.insert(layer).second) {
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
  for (const auto& [name, quantizer] : layer.layer->quant_state()->quantizers()) {
    quantizers.emplace_back(layer.name + ".quant." + name, quantizer.get());
  }
  return quantizers;
}

std::string join(const std::vector<std::string>& names) { return fmt::format("{}", fmt::join(names, ", ")); }

bool is_overridden(const QConfig& config, const std::string& name) {
  return std::any_of(config.overrides.begin(), config.overrides.end(),
                     [&](const auto& item) { return matches(item.first, name); });
}

void check_strict(const char* function, const QConfig& config, const std::vector<Layer>& layers,
                  const std::vector<FloatLayer>& floating) {
  std::vector<std::string> names;
  for (const auto& layer : layers) {
    names.push_back(layer.name);
  }
  for (const auto& [pattern, unused] : config.overrides) {
    const auto& key = pattern;
    const bool used =
        std::any_of(names.begin(), names.end(), [&](const auto& name) { return matches(key, name); }) ||
        std::any_of(floating.begin(), floating.end(), [&](const auto& item) { return matches(key, item.name); });
    TORCH_CHECK_VALUE(used, "[", function, "] override '", pattern,
                      "' must match a rarefy::nn layer, but matches none of: ", join(names));
  }
  std::vector<std::string> left;
  for (const auto& layer : floating) {
    if (!layer.reason.empty() && !is_overridden(config, layer.name)) {
      left.push_back(fmt::format("{} ({})", layer.name, layer.reason));
    }
  }
  TORCH_CHECK_VALUE(
      left.empty(), "[", function,
      "] every layer must be quantized or excluded by an override without a value (or strict must be off), "
      "but these are not: ",
      join(left));
}

/// One layer that the configuration may be about: of rarefy::nn, or of torch::nn with a twin to make.
struct Candidate {
  std::string name;
  std::shared_ptr<nn::Quantizable> layer;  // of torch::nn: null until the twin is made
  const FloatLayer* floating = nullptr;
  bool has_weight() const { return floating != nullptr || layer->has_weight(); }
  std::string kind() const { return floating != nullptr ? floating->kind : layer->kind(); }
};

/// In the order of named_modules, in which the first and the last layer are told.
std::vector<Candidate> candidates_of(const torch::nn::Module& model, const std::vector<Layer>& layers,
                                     const std::vector<FloatLayer>& floating) {
  std::map<std::string, Candidate> by_name;
  for (const auto& layer : layers) {
    by_name[layer.name] = {layer.name, std::shared_ptr<nn::Quantizable>(layer.module, layer.layer)};
  }
  for (const auto& layer : floating) {
    if (layer.reason.empty()) {
      by_name[layer.name] = {layer.name, nullptr, &layer};
    }
  }
  std::vector<Candidate> candidates;
  for (const auto& item : model.named_modules("", /*include_self=*/false)) {
    if (const auto found = by_name.find(item.key()); found != by_name.end()) {
      candidates.push_back(found->second);
    }
  }
  return candidates;
}

/// The attention that computes with a layer, its output projection; empty for other layers.
std::string owner_of(const std::string& name, const std::vector<Candidate>& candidates) {
  constexpr std::string_view kProjection = ".out_proj";
  if (!name.ends_with(kProjection)) {
    return "";
  }
  const auto owner = name.substr(0, name.size() - kProjection.size());
  const bool is_attention = std::any_of(candidates.begin(), candidates.end(), [&](const auto& candidate) {
    return candidate.name == owner && candidate.kind() == "MultiheadAttention";
  });
  return is_attention ? owner : "";
}

/// The layers that first_last_fp32 keeps, by name.
std::vector<std::string> first_and_last(const QConfig& config, const std::vector<Candidate>& candidates) {
  std::vector<std::string> weighted;
  for (const auto& candidate : candidates) {
    if (config.first_last_fp32 && candidate.has_weight() && owner_of(candidate.name, candidates).empty()) {
      weighted.push_back(candidate.name);
    }
  }
  return weighted.empty() ? weighted : std::vector<std::string>{weighted.front(), weighted.back()};
}

/// Evaluation mode as long as it lives; afterwards every module is in the mode that it was in.
class Evaluating {
 public:
  explicit Evaluating(torch::nn::Module& model) {
    for (const auto& module : model.modules(/*include_self=*/false)) {
      before_.emplace_back(module, module->is_training());
    }
    self_ = {&model, model.is_training()};
    model.eval();
  }
  Evaluating(const Evaluating&) = delete;
  Evaluating& operator=(const Evaluating&) = delete;
  ~Evaluating() {
    self_.first->train(self_.second);
    for (auto& [module, training] : before_) {
      module->train(training);
    }
  }

 private:
  std::vector<std::pair<std::shared_ptr<torch::nn::Module>, bool>> before_;
  std::pair<torch::nn::Module*, bool> self_;
};

/// What layers and quantizers spare each other during a calibration, as long as it lives: a weight is folded, observed and
/// rounded once, and a tensor that several quantizers see is observed once.
class Sparing {
 public:
  explicit Sparing(const std::vector<Layer>& layers) : layers_(layers) {
    set(/*keep=*/true, std::make_shared<ObservedOnce>());
  }
  Sparing(const Sparing&) = delete;
  Sparing& operator=(const Sparing&) = delete;
  ~Sparing() { set(/*keep=*/false, nullptr); }

 private:
  void set(bool keep, const std::shared_ptr<ObservedOnce>& once) {
    for (const auto& layer : layers_) {
      layer.layer->quant_state()->keep(keep);
      for (const auto& [name, quantizer] : layer.layer->quant_state()->quantizers()) {
        quantizer->observed_once = once;
      }
    }
  }

  const std::vector<Layer>& layers_;
};

/// Checks everything, and makes and prepares the twins, before the first layer of the model changes.
void prepare_layers(const char* function, torch::nn::Module& model, const QConfig& config,
                    const Observer& default_observer, bool quantize, bool strict) {
  config.validate();
  for (const auto& [pattern, override_] : config.overrides) {
    if (override_.has_value()) {
      override_->validate();
    }
  }
  const TargetProfile* profile = config.target.has_value() ? &target_profile(*config.target) : nullptr;
  const auto layers = layers_of(model);
  const auto floating = float_layers(model);
  if (strict) {
    check_strict(function, config, layers, floating);
  }
  auto candidates = candidates_of(model, layers, floating);
  const auto ends = first_and_last(config, candidates);
  std::vector<std::pair<Candidate*, LayerConfig>> todo;
  std::vector<std::pair<Candidate*, std::string>> skipped;
  for (auto& candidate : candidates) {
    bool overridden = is_overridden(config, candidate.name);
    const auto owner = owner_of(candidate.name, candidates);
    const auto is_owner = [&](const auto& item) { return item.first->name == owner; };
    const auto attention = std::find_if(todo.begin(), todo.end(), is_owner);
    if (!owner.empty() && attention == todo.end()) {
      skipped.emplace_back(&candidate, owner + ", to which it belongs, stays in FP32");
      continue;
    }
    if (!overridden && std::find(ends.begin(), ends.end(), candidate.name) != ends.end()) {
      skipped.emplace_back(&candidate, candidate.name == ends.front()
                                           ? "kept in FP32 as the first layer (first_last_fp32)"
                                           : "kept in FP32 as the last layer (first_last_fp32)");
      continue;
    }
    auto resolved = owner.empty() || overridden ? config.resolve(candidate.name) : attention->second;
    overridden = overridden || (!owner.empty() && is_overridden(config, owner));
    if (!resolved.has_value() || !resolved->weight.has_value()) {
      skipped.emplace_back(&candidate, overridden ? "kept in FP32 by an override" : "");
      continue;
    }
    TORCH_CHECK_VALUE(candidate.layer == nullptr || candidate.layer->mode() == nn::Quantizable::Mode::floating, "[",
                      function, "] layer ", candidate.name, " must be floating point, but is already prepared");
    const auto reason = resolved->why_not_integer();
    TORCH_CHECK_VALUE(!candidate.has_weight() || resolved->execution != Execution::integer || !reason.has_value(), "[",
                      function, "] layer ", candidate.name, " cannot execute in integers: ", reason.value_or(""));
    if (profile != nullptr) {
      if (!overridden && !profile->executes(candidate.kind())) {
        skipped.emplace_back(&candidate, fmt::format("kept in FP32: {} does not run it in integers", profile->name));
        continue;
      }
      const auto forbidden = profile->why_not(*resolved, candidate.kind());
      TORCH_CHECK_VALUE(!forbidden.has_value(), "[", function, "] layer ", candidate.name,
                        " must have schemes that the target executes, but ", forbidden.value_or(""));
      resolved = profile->adapt(*resolved, candidate.kind());
    }
    todo.emplace_back(&candidate, *resolved);
  }
  TORCH_CHECK_VALUE(!todo.empty(), "[", function,
                    "] the model must have a rarefy::nn layer that the configuration quantizes, got ",
                    candidates.size(), " rarefy::nn layers and none to quantize");
  for (auto& [candidate, layer_config] : todo) {
    if (candidate->floating != nullptr) {
      candidate->layer = candidate->floating->make();
    }
    if (profile != nullptr && !profile->scales_of_groups && candidate->layer->has_scales_of_groups()) {
      layer_config.weight->granularity = PerTensor{};
    }
    if (candidate->floating != nullptr) {
      candidate->layer->prepare(layer_config, default_observer);
    }
  }
  for (auto& [candidate, layer_config] : todo) {
    if (profile != nullptr && profile->residual == Residual::identity) {
      if (auto* add = dynamic_cast<nn::AddImpl*>(candidate->layer.get())) {
        add->quantized_inputs = {"input1"};
      }
    }
    if (auto* boundary = dynamic_cast<nn::Boundary*>(candidate->layer.get())) {
      boundary->set_quantizes_input(profile != nullptr && profile->boundary_inputs);
    }
    if (candidate->floating != nullptr) {
      candidate->floating->insert();
    } else {
      candidate->layer->prepare(layer_config, default_observer);
    }
    candidate->layer->target = config.target.value_or("");
    auto* state = candidate->layer->quant_state();
    if (state == nullptr) {
      candidate->layer->note = "the configuration quantizes weights only";
      continue;
    }
    for (const auto& [name, quantizer] : state->quantizers()) {
      quantizer->name = candidate->name + ".quant." + name;
      if (!quantize) {
        quantizer->quantize = quantizer->is_weight();
        quantizer->observe = quantizer->quantize;
      }
    }
  }
  for (const auto& [candidate, reason] : skipped) {
    if (candidate->layer != nullptr) {
      candidate->layer->note = reason;
    }
  }
}

}  // namespace

void prepare_qat(torch::nn::Module& model, const QConfig& config, bool strict) {
  prepare_layers("prepare_qat", model, config, MovingAverage{}, /*quantize=*/true, strict);
}

void prepare(torch::nn::Module& model, const QConfig& config, bool strict) {
  prepare_layers("prepare", model, config, MinMax{}, /*quantize=*/false, strict);
}

void calibrate(torch::nn::Module& model, const std::function<void()>& run) {
  struct Before {
    std::string name;
    FakeQuantizerImpl* quantizer;
    bool observe, quantize, is_weight;
    std::function<void(torch::Tensor&)> all_reduce_max;
    std::vector<torch::Tensor> state;
    std::map<std::string, torch::Tensor> statistics;
  };
  const auto state_of = [](FakeQuantizerImpl& q) {
    std::vector<torch::Tensor> state;
    for (const auto& [key, parameter] : q.learned) {
      state.push_back(parameter);
    }
    state.insert(state.end(), {q.min_val, q.max_val, q.scale, q.zero_point, q.skipped});
    return state;
  };
  const torch::NoGradGuard no_grad;
  std::vector<Before> before;
  const auto layers = prepared_layers("calibrate", model);
  for (const auto& layer : layers) {
    for (const auto& [name, quantizer] : quantizers_of(layer)) {
      before.push_back({name,
                        quantizer,
                        quantizer->observe,
                        quantizer->quantize,
                        quantizer->is_weight(),
                        quantizer->all_reduce_max,
                        {},
                        {}});
      for (const auto& tensor : state_of(*quantizer)) {
        before.back().state.push_back(tensor.clone());
      }
      if (auto& statistics = quantizer->statistics) {
        for (const auto& [key, tensor] : statistics->tensors()) {
          before.back().statistics[key] = tensor.clone();
        }
        if (quantizer->all_reduce_max) {
          statistics->clear();  // those of before are of all processes already
        }
      }
      quantizer->all_reduce_max = nullptr;  // the processes meet once, at the end
      if (!before.back().is_weight) {
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
      item.quantizer->all_reduce_max = item.all_reduce_max;
      const auto state = state_of(*item.quantizer);
      for (size_t i = 0; i < state.size(); ++i) {
        state[i].copy_(item.state[i]);
      }
      for (const auto& [key, tensor] : item.statistics) {
        item.quantizer->statistics->tensors().at(key).copy_(tensor);
      }
      item.quantizer->refresh();
    }
    model.train(training);
  };
  model.eval();
  std::vector<std::string> missed, not_finite, counts;
  try {
    {
      const Sparing sparing(layers);
      run();
    }
    for (const auto& item : before) {
      item.quantizer->all_reduce_max = item.all_reduce_max;
      if (item.all_reduce_max && !item.is_weight) {
        item.quantizer->merge_over_processes();
        if (auto& statistics = item.quantizer->statistics) {
          statistics->add(item.statistics);
        }
      }
      const auto skipped = item.quantizer->skipped.item<int64_t>() - item.state.back().item<int64_t>();
      if (!item.quantizer->calibrated()) {
        (skipped > 0 ? not_finite : missed).push_back(item.name);
      } else if (skipped > 0) {
        counts.push_back(fmt::format("{} ({})", item.name, skipped));
      }
    }
    TORCH_CHECK_VALUE(missed.empty(), "[calibrate] every quantizer must see data, but none reached: ", join(missed));
    TORCH_CHECK_VALUE(not_finite.empty(),
                      "[calibrate] every quantizer must see a finite batch, but every batch held NaN or "
                      "infinite values at: ",
                      join(not_finite));
  } catch (...) {
    restore();
    throw;
  }
  model.train(training);
  for (const auto& item : before) {
    item.quantizer->observe = item.is_weight && item.quantizer->observe;
    item.quantizer->quantize = true;
  }
  if (!counts.empty()) {
    TORCH_WARN("[calibrate] batches with NaN or infinite values were left out at: ", join(counts));
  }
}

void convert(torch::nn::Module& model, const std::function<std::vector<torch::Tensor>()>& forward) {
  const auto layers = prepared_layers("convert", model);
  std::vector<std::string> missed;
  for (const auto& layer : layers) {
    for (const auto& [name, quantizer] : quantizers_of(layer)) {
      // A weight is observed when it is converted.
      if (!quantizer->is_weight() && !quantizer->calibrated()) {
        missed.push_back(name);
      }
    }
  }
  TORCH_CHECK_VALUE(
      missed.empty(),
      "[convert] every quantizer must be calibrated (train or calibrate first), but these are not: ", join(missed));
  check_masks(model, "convert");
  if (forward != nullptr) {
    // What fails does so here, where nothing is lost yet: conversion cannot be undone.
    const torch::NoGradGuard no_grad;
    const Evaluating guard(model);
    forward();
  }
  for (const auto& layer : layers) {
    for (const auto& [name, quantizer] : quantizers_of(layer)) {
      quantizer->settle_bits();
    }
  }
  remove_masks(model);  // the zeros are integers from now on, and nothing writes those
  for (const auto& layer : layers) {
    layer.layer->convert();
    for (const auto& [name, quantizer] : quantizers_of(layer)) {
      quantizer->drop_statistics();
    }
  }
  remove_spent_batch_norms(model);
  if (forward != nullptr) {
    link(model, forward);
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
  // Only read: a report changes no module.
  for (const auto& layer : float_layers(const_cast<torch::nn::Module&>(model))) {
    text += fmt::format("{:<32} {:<10} fp32  {}\n", layer.name, layer.kind,
                        layer.reason.empty() ? "not prepared" : layer.reason);
  }
  for (const auto& layer : layers_of(model)) {
    const auto mode = layer.layer->mode();
    text += fmt::format("{:<32} {:<10} {}", layer.name, layer.layer->kind(),
                        mode == nn::Quantizable::Mode::floating   ? "fp32"
                        : mode == nn::Quantizable::Mode::prepared ? "prepared"
                        : layer.layer->packed_weight() != nullptr ? "packed"
                                                                  : "integer");
    if (mode != nn::Quantizable::Mode::floating) {
      if (!layer.layer->target.empty()) {
        text += "  for " + layer.layer->target;
      }
      if (const auto* packed = layer.layer->packed_weight()) {
        const auto values = c10::multiply_integers(packed->shape);
        text += fmt::format("  weight: {} in {} bytes, {:.2f} bits per value", packed->scheme.str(), packed->nbytes(),
                            8.0 * static_cast<double>(packed->nbytes()) / static_cast<double>(values));
      }
      for (const auto& [name, quantizer] : quantizers_of(layer)) {
        text += fmt::format("  {}: {}", name.substr(name.rfind('.') + 1), quantizer->options.scheme.str());
        if (const auto skipped = quantizer->skipped.item<int64_t>(); skipped > 0) {
          text += fmt::format(" ({} batches not finite)", skipped);
        }
      }
      if (layer.layer->quant_state()->next() != nullptr) {
        text += "  gives bytes";
      } else if (!layer.layer->note.empty()) {
        text += "  " + layer.layer->note;
      }
    } else if (!layer.layer->note.empty()) {
      text += "  " + layer.layer->note;
    }
    text += "\n";
  }
  return text;
}

}  // namespace rarefy::quantization
