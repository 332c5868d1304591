#pragma once

#include <rarefy/export.h>
#include <rarefy/quantization/quantized_checkpoint.h>
#include <torch/nn/module.h>

#include <filesystem>

// Converted models in folders that both languages write and read: see rarefy/quantization/quantized_checkpoint.h.
namespace rarefy::quantization {

/// Writes a converted model: its tensors, which layers compute with integers, and on which grids.
/// Throws as write_quantized(), and c10::ValueError for a model that is not converted or that has a prepared layer left.
RAREFY_API void save_quantized(const torch::nn::Module& model, const std::filesystem::path& folder);

/// Makes a freshly built float model the converted one of a folder that was written in either language, and puts it into
/// evaluation mode. No data is needed, and no configuration.
///
/// The model is of the class that was converted: of rarefy::nn layers, or of layers of torch::nn in Sequentials, ModuleLists
/// and ModuleDicts, which are replaced as prepare_qat does it. A batch normalization that was folded into integers makes room
/// for a SpentBatchNorm in a container, and is gone in a ConvBn; a rarefy::nn::ConvBn2d called `conv1` takes the integers of
/// a convolution `conv1` in Python whose batch normalization stood beside it.
///
/// Throws c10::ValueError, with the model unchanged, for whatever read_quantized() refuses; a layer that the model does not
/// have, has in another kind or shape, or has prepared already; a batch normalization that cannot be taken out; tensors that
/// are missing, unexpected, or of other shapes or types.
RAREFY_API void load_quantized(torch::nn::Module& model, const std::filesystem::path& folder);

}  // namespace rarefy::quantization
