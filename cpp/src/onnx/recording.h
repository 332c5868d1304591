// The run of a model that is translated.
#pragma once

#include <torch/nn/module.h>

#include <functional>
#include <vector>

#include "onnx/translate.h"

namespace rarefy::onnx {

/// Runs `forward` on the inputs and, where `dynamic`, on batches with one row more and with many more, and records what it
/// calls. What depends on parameters and constants alone is computed (folded weights, fake-quantized weights, masks).
/// Throws c10::ValueError when the runs call other operators or compute with other constants.
Recording record_runs(torch::nn::Module& model,
                      const std::function<std::vector<at::Tensor>(const std::vector<at::Tensor>&)>& forward,
                      const std::vector<at::Tensor>& inputs, bool dynamic);

}  // namespace rarefy::onnx
