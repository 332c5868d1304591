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

/// Copies what a file holds into tensors of a model as load_safetensors() does; `file` and `function` are for messages.
/// `before_copying` is called when everything has been checked; when it throws, the tensors are unchanged.
LoadResult load_into(const State& state, const Checkpoint& checkpoint, const std::string& file, bool strict,
                     const std::function<void()>& before_copying = nullptr, const char* function = "load_safetensors");

/// The same for the whole state of a model, whose quantizers take notice.
LoadResult load_into(torch::nn::Module& model, const Checkpoint& checkpoint, const std::string& file, bool strict,
                     const std::function<void()>& before_copying = nullptr);

}  // namespace rarefy
