#pragma once

#include <rarefy/export.h>
#include <torch/nn/module.h>
#include <torch/ordered_dict.h>

#include <filesystem>
#include <map>
#include <string>
#include <vector>

// Weights in files of the safetensors format, which hold tensors and text only and run nothing when they are read. Python's
// counterpart is the package safetensors: safetensors.torch.save_model and load_model read and write the same files.
namespace rarefy {

using NamedTensors = torch::OrderedDict<std::string, torch::Tensor>;
/// Text that travels with the tensors.
using Metadata = std::map<std::string, std::string>;

/// What a file holds.
struct Checkpoint {
  /// On the CPU, in the order of the file.
  NamedTensors tensors;
  Metadata metadata;
};

/// What did not match when a model was loaded.
struct LoadResult {
  /// Of the model, and not in the file.
  std::vector<std::string> missing;
  /// In the file, and not of the model.
  std::vector<std::string> unexpected;
};

/// Writes tensors: of any layout in memory and on any device; bool, integers of 8 to 64 bits, floating point of 8 to 64
/// bits, complex64. The file is written under another name in the same folder and renamed once it is complete and on the
/// disk, so that a failure (a full disk, a crash) leaves the file that was there.
/// Throws c10::ValueError for a tensor that is undefined, sparse or of another type and for names that are not UTF-8 or are
/// "__metadata__"; c10::Error when the file cannot be written.
RAREFY_API void save_safetensors(const NamedTensors& tensors, const std::filesystem::path& path,
                                 const Metadata& metadata = {});

/// Writes the parameters and buffers of a model under their dotted names. A tensor that the model holds under several names
/// is written once, under the first of them in the alphabet; the metadata map each other name to that one.
/// Throws c10::ValueError, too, when weights of a model with pruning masks are not zero where their mask prunes.
RAREFY_API void save_safetensors(const torch::nn::Module& model, const std::filesystem::path& path,
                                 const Metadata& metadata = {});

/// Reads a file. Every rule of the format is checked before a tensor is made: a header of at most 100 MB that is JSON in
/// UTF-8 without repeated names; known types; sizes that match the shapes; tensors that cover the data without gap or overlap.
/// Throws c10::ValueError that names the file and the broken rule; c10::Error when the file cannot be read.
RAREFY_API Checkpoint load_safetensors(const std::filesystem::path& path);

/// Reads a file into the parameters and buffers of a model: floating point, prepared or converted, as the file is. Values
/// are copied, so that optimizers stay valid. Floating point loads into floating point of another width; other types must
/// be equal. A tensor that the model holds under several names needs to be in the file under one of them.
/// Throws c10::ValueError, with the model unchanged, for whatever the function above refuses, for shapes or types that do
/// not fit (they are listed) and, when `strict`, for missing and unexpected names.
RAREFY_API LoadResult load_safetensors(torch::nn::Module& model, const std::filesystem::path& path, bool strict = true);

}  // namespace rarefy
