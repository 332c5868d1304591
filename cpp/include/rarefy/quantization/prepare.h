#pragma once

#include <rarefy/export.h>
#include <rarefy/quantization/qconfig.h>
#include <torch/nn/module.h>

#include <functional>
#include <string>
#include <vector>

// The verbs. They act on the rarefy::nn layers of the model that they are given, and switch them in place.
namespace rarefy::quantization {

/// Switches on quantization-aware training: every layer that `config` quantizes computes with fake-quantized input and
/// weight from now on. Parameters, their names and an optimizer that holds them stay valid.
///
/// Layers of rarefy::nn switch where they are. A torch::nn::Linear, Conv1d, Conv2d, Conv3d or Embedding that only
/// Sequentials, ModuleLists and ModuleDicts hold is replaced by its rarefy::nn twin over the same parameters (a ModuleHolder
/// kept elsewhere still holds the old one). In a Sequential, a BatchNorm right after a convolution is folded into it: a
/// FoldedBatchNorm with the same parameters takes its place, so that all names stay; and a ReLU right after a layer (or its
/// BatchNorm) becomes part of it, with an Identity in its place.
///
/// strict: an override that matches no layer is an error, and so is a layer of torch::nn that can be neither switched nor
/// replaced (a typed member, a subclass) and that no override excludes. Without it both are left alone.
///
/// Throws c10::ValueError, with the model unchanged, when `config` is invalid, something is amiss with `strict`, a layer cannot
/// execute as the configuration demands, the model has no layer left to quantize, or a layer is prepared already.
RAREFY_API void prepare_qat(torch::nn::Module& model, const QConfig& config, bool strict = true);

/// The same for quantization after training: the layers observe when calibrate() runs them.
RAREFY_API void prepare(torch::nn::Module& model, const QConfig& config, bool strict = true);

/// Runs `run` (which feeds the model) in evaluation mode without gradients while the activation quantizers observe and do
/// not quantize; afterwards they quantize with the ranges seen. Restores the training mode.
/// Weights are folded, observed, searched and rounded once, and a tensor that several quantizers see is observed once, with the
/// result of doing it for every batch: on one thread, as the quantizers share what they have seen.
/// Batches with NaN or infinite values are left out; a warning says how many at which quantizer. Where ranges are shared
/// between processes (set_process_group) they are merged once, at the end: every process must call this.
/// Throws c10::ValueError when the model was not prepared or `run` fed nothing, or nothing finite, to some layer (they are
/// named), and passes on what `run` throws; the quantizers are then as they were.
RAREFY_API void calibrate(torch::nn::Module& model, const std::function<void()>& run);

/// Switches the prepared layers to int8 kernels; float weights are gone afterwards. For inference.
///
/// With `forward`, which runs the model once and returns its outputs, the layers hand bytes on where they can: a layer whose
/// result reaches integer layers alone, all on one grid, rounds it itself, so that no float tensor is written between them.
/// Values stay the same. The links are those of this run: a model that takes another way through its layers for other
/// inputs, or that asks for the type of a result, must go without. Weights of 2-d convolutions are laid out channels-last,
/// and activations with them, if the model runs so. report() says which layers give bytes, and why others do not.
///   [&] { return std::vector{net->forward(x)}; }
///
/// Zeros that a pruner holds are zeros among the integers, and final: masks are taken out of the model.
///
/// Throws c10::ValueError that lists the layers which have not been calibrated, or names a weight that is not zero where its
/// mask prunes, and passes on what `forward` throws on the
/// prepared model, with the model unchanged.
RAREFY_API void convert(torch::nn::Module& model, const std::function<std::vector<torch::Tensor>()>& forward = nullptr);

/// What each fake quantizer does from now on. Unset: unchanged.
RAREFY_API void set_state(torch::nn::Module& model, std::optional<bool> observe, std::optional<bool> quantize);

/// One line per layer: name, kind, mode, schemes, batches left out, why it is in FP32.
RAREFY_API std::string report(const torch::nn::Module& model);

}  // namespace rarefy::quantization
