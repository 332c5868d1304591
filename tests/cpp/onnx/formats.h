#pragma once

#include <filesystem>

/// Writes FOLDER/formats-<scheme>.onnx and .safetensors as rarefy_onnx_models has them: one network in every format of weights, and
/// its activations in every format of those.
void write_formats(const std::filesystem::path& folder);
