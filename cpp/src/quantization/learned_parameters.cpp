#include <rarefy/quantization/fake_quantizer.h>
#include <rarefy/quantization/learned_parameters.h>
#include <torch/types.h>

#include <map>
#include <set>
#include <string>

namespace rarefy::quantization {
namespace {

std::map<std::string, FakeQuantizerImpl*> quantizers_by_name(const torch::nn::Module& model) {
  std::map<std::string, FakeQuantizerImpl*> found;
  for (const auto& item : model.named_modules("", /*include_self=*/false)) {
    if (auto* quantizer = item.value()->as<FakeQuantizerImpl>()) {
      found[item.key()] = quantizer;
    }
  }
  return found;
}

/// The whole number of bits, with the gradient of the parameter.
torch::Tensor whole_bits(const FakeQuantizerImpl& quantizer) {
  const auto& bits = quantizer.learned.at("bits");
  const auto lowest = std::get<LearnedBits>(quantizer.options.observer).lowest;
  const auto whole = bits.detach().round().clamp(lowest, quantizer.greatest_bits());
  return (whole + (bits - bits.detach())).to(torch::kFloat32).sum();
}

}  // namespace

SplitParameters split_parameters(const torch::nn::Module& model) {
  std::set<const c10::TensorImpl*> of_quantizers, seen;
  for (const auto& [name, quantizer] : quantizers_by_name(model)) {
    for (const auto& [key, parameter] : quantizer->learned) {
      of_quantizers.insert(parameter.unsafeGetTensorImpl());
    }
  }
  SplitParameters split;
  for (const auto& parameter : model.parameters()) {
    const auto* identity = parameter.unsafeGetTensorImpl();
    if (parameter.requires_grad() && seen.insert(identity).second) {
      (of_quantizers.contains(identity) ? split.quantizers : split.network).push_back(parameter);
    }
  }
  return split;
}

torch::Tensor model_size_bits(const torch::nn::Module& model) {
  const auto quantizers = quantizers_by_name(model);
  std::map<std::string, const FakeQuantizerImpl*> of_weights;  // by the name of the parameter that is quantized
  std::set<const c10::TensorImpl*> seen;
  for (const auto& [name, quantizer] : quantizers) {
    if (const auto place = name.rfind(".quant."); place != std::string::npos && quantizer->is_weight()) {
      of_weights[name.substr(0, place) + name.substr(place + 6)] = quantizer;
    }
    for (const auto& [key, parameter] : quantizer->learned) {
      seen.insert(parameter.unsafeGetTensorImpl());  // not counted
    }
  }
  double fixed = 0.0;
  torch::Tensor total = torch::zeros({}, torch::kFloat32);
  for (const auto& item : model.named_parameters()) {
    const auto& parameter = item.value();
    if (!seen.insert(parameter.unsafeGetTensorImpl()).second) {
      continue;
    }
    const auto count = static_cast<double>(parameter.numel());
    const auto found = of_weights.find(item.key());
    if (found == of_weights.end()) {
      fixed += count * 8.0 * static_cast<double>(parameter.element_size());
    } else if (std::holds_alternative<LearnedBits>(found->second->options.observer)) {
      const auto bits = whole_bits(*found->second);
      total = total.to(bits.device()) + bits * count;
    } else {
      fixed += count * static_cast<double>(found->second->options.scheme.bits);
    }
  }
  return total + fixed;
}

torch::Tensor pact_penalty(const torch::nn::Module& model) {
  torch::Tensor total = torch::zeros({}, torch::kFloat32);
  for (const auto& [name, quantizer] : quantizers_by_name(model)) {
    if (const auto alpha = quantizer->learned.find("alpha"); alpha != quantizer->learned.end()) {
      total = total.to(alpha->second.device()) + alpha->second.to(torch::kFloat32).square().sum();
    }
  }
  return total;
}

}  // namespace rarefy::quantization
