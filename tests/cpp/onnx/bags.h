#pragma once

#include <filesystem>

/// Writes FOLDER/bags-<state>.onnx and .safetensors: every kind of bag of embeddings, "input.0" the indices and "input.1" the weights of
/// samples; outputs are called after the bags.
void write_bags(const std::filesystem::path& folder);

/// Writes FOLDER/adapters-<base>-<state>.onnx and .safetensors as rarefy_onnx_models has them: a LoRALinear between two linear layers;
/// "weight" is its base as numbers.
void write_adapters(const std::filesystem::path& folder);
