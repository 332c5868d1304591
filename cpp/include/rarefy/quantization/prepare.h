#pragma once

#include <rarefy/export.h>
#include <rarefy/quantization/qconfig.h>
#include <torch/nn/module.h>

#include <functional>
#include <string>

// The verbs. They act on the rarefy::nn layers of the model that they are given, and switch them in place.
namespace rarefy::quantization {

/// Switches on quantization-aware training: every rarefy::nn layer that `config` quantizes computes with fake-quantized
/// input and weight from now on. Parameters, their names and an optimizer that holds them stay valid.
/// Throws c10::ValueError, with the model unchanged, when `config` is invalid, an override matches no layer, the model has
/// no rarefy::nn layer left to quantize, or a layer is prepared already.
RAREFY_API void prepare_qat(torch::nn::Module& model, const QConfig& config);

/// The same for quantization after training: the layers observe when calibrate() runs them.
RAREFY_API void prepare(torch::nn::Module& model, const QConfig& config);

/// Runs `run` (which feeds the model) in evaluation mode without gradients while the activation quantizers observe and do
/// not quantize; afterwards they quantize with the ranges seen. Restores the training mode.
/// Throws c10::ValueError when the model was not prepared or `run` fed nothing to some layer (they are named), and passes on
/// what `run` throws; the quantizers' switches are then as they were.
RAREFY_API void calibrate(torch::nn::Module& model, const std::function<void()>& run);

/// Switches the prepared layers to int8 kernels; float weights are gone afterwards. For inference.
/// Throws c10::ValueError that lists the layers which have not been calibrated, with the model unchanged.
RAREFY_API void convert(torch::nn::Module& model);

/// What each fake quantizer does from now on. Unset: unchanged.
RAREFY_API void set_state(torch::nn::Module& model, std::optional<bool> observe, std::optional<bool> quantize);

/// One line per rarefy::nn layer: name, kind, mode, schemes.
RAREFY_API std::string report(const torch::nn::Module& model);

}  // namespace rarefy::quantization
