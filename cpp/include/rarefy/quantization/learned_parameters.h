#pragma once

#include <rarefy/export.h>
#include <torch/nn/module.h>
#include <torch/optim/optimizer.h>

#include <memory>
#include <vector>

// The parameters of learned quantizers (rarefy/quantization/learned.h) beside those of the network: for optimizers and losses.
namespace rarefy::quantization {

/// The parameters of a model that require a gradient, each once.
struct SplitParameters {
  std::vector<torch::Tensor> network;
  std::vector<torch::Tensor> quantizers;  ///< those of fake quantizers
};
RAREFY_API SplitParameters split_parameters(const torch::nn::Module& model);

/// Two groups for an optimizer: the network's parameters with the options given, and those of quantizers with the learning rate
/// `quantizer_rate` and without weight decay. Make the optimizer after prepare_qat or prepare, which make the parameters.
///   const auto options = torch::optim::SGDOptions(0.01).momentum(0.9);
///   torch::optim::SGD optimizer(parameter_groups(*net, options, 0.002), torch::optim::SGDOptions(1e-3));
/// The optimizer's own options, the last argument, must be LibTorch's defaults (1e-3 is the rate's): an option of a group that
/// equals its default is taken from them, so that a weight decay there would come back to the quantizers.
template <typename Options>
std::vector<torch::optim::OptimizerParamGroup> parameter_groups(const torch::nn::Module& model, const Options& options,
                                                                double quantizer_rate) {
  auto parameters = split_parameters(model);
  std::vector<torch::optim::OptimizerParamGroup> groups;
  groups.emplace_back(std::move(parameters.network), std::make_unique<Options>(options));
  if (!parameters.quantizers.empty()) {
    auto own = std::make_unique<Options>(options);
    own->lr(quantizer_rate);
    own->weight_decay(0.0);
    groups.emplace_back(std::move(parameters.quantizers), std::move(own));
  }
  return groups;
}

/// The size of the parameters of a model in bits, as a float32 scalar: a quantized weight has the bits of its scheme, or of its
/// LearnedBits, through which the result has a gradient (straight through the rounding to whole bits); others have those of
/// their type. Scales and codebooks are not counted.
RAREFY_API torch::Tensor model_size_bits(const torch::nn::Module& model);

/// The sum of the squares of all PACT clipping values, for the loss (Choi et al., 2018, section 3): a float32 scalar with a
/// gradient, 0 where there are none.
RAREFY_API torch::Tensor pact_penalty(const torch::nn::Module& model);

}  // namespace rarefy::quantization
