// Bytes between converted layers: which layer may give its result as the bytes that its readers take.
#pragma once

#include <torch/nn/module.h>

#include <functional>
#include <vector>

namespace rarefy::quantization {

/// Links the converted layers of a model, none of which is linked, and fuses the ReLUs that alone follow them. A layer is
/// linked when everything that reads its result, on every way through operations that only move values, is an integer
/// layer, all of them on one grid: it then rounds to that grid itself, as its readers would have done. The note of each other
/// layer says why it gives floats. Passes on what `forward` throws, with the model unchanged.
void link(torch::nn::Module& model, const std::function<std::vector<torch::Tensor>()>& forward);

}  // namespace rarefy::quantization
