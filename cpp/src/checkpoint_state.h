// What the functions of checkpoint.cpp do, for others that read and write models.
#pragma once

#include <rarefy/checkpoint.h>

#include <functional>
#include <string>
#include <utility>
#include <vector>

namespace rarefy {

using State = std::vector<std::pair<std::string, torch::Tensor>>;

/// The parameters and buffers of a model by name; one with several names under each.
State state_of(const torch::nn::Module& model);

/// Leaves one name for each tensor, the first in the alphabet, and adds the others to the metadata.
NamedTensors without_duplicates(State state, Metadata& metadata);

/// load_safetensors() from what a file holds; `file` is for messages. `before_copying` is called when everything has been
/// checked; when it throws, the model is unchanged.
LoadResult load_into(torch::nn::Module& model, const Checkpoint& checkpoint, const std::string& file, bool strict,
                     const std::function<void()>& before_copying = nullptr);

}  // namespace rarefy
