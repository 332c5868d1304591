#pragma once

#include <rarefy/checkpoint.h>
#include <rarefy/export.h>
#include <rarefy/pruning/resize.h>
#include <rarefy/pruning/surgery.h>

#include <cstdint>
#include <filesystem>
#include <functional>
#include <map>
#include <string>
#include <vector>

// A pruned model in a file: a safetensors file whose metadata say what was removed, so that a freshly constructed model of
// the original class can be cut to fit. Files of Python and of C++ are the same.
namespace rarefy::pruning {

/// One tensor: its shape as constructed, and which of those indices are left.
struct RAREFY_API TensorRecord {
  std::vector<int64_t> shape;
  Kept kept;

  /// Takes in a cut whose indices count what was left before it.
  void cut(int64_t dim, const std::vector<int64_t>& indices);
  /// The shape that is left.
  std::vector<int64_t> current_shape() const;
  bool operator==(const TensorRecord&) const = default;
};

/// What was removed from a model, over all prunings so far.
struct RAREFY_API Manifest {
  std::map<std::string, TensorRecord> tensors;
  Attributes attributes;

  /// Takes in what a surgery has applied and not committed yet.
  ///   tensors  the parameters and buffers of the model
  ///   changed  what resize_modules() gave
  void record(const Surgery& surgery, const std::vector<graph::NamedTensor>& tensors, const Attributes& changed = {});

  /// The JSON text that save_pruned() writes under kManifestKey.
  std::string to_json() const;
  /// Throws c10::ValueError, which names `file`, for text that is no manifest or of a later format.
  static Manifest from_json(const std::string& json, const std::string& file);
  bool operator==(const Manifest&) const = default;
};

inline constexpr const char* kManifestKey = "rarefy.pruned";

/// Writes tensors with what was removed from them; as save_safetensors(), whole or not at all. One that is there under several
/// names is written once. Throws c10::ValueError for a record that does not fit its tensor.
RAREFY_API void save_pruned(const NamedTensors& tensors, const Manifest& manifest, const std::filesystem::path& path);
RAREFY_API void save_pruned(const torch::nn::Module& model, const Manifest& manifest,
                            const std::filesystem::path& path);

/// The manifest of a file. Throws c10::ValueError, which names the file, when there is none or it is broken.
RAREFY_API Manifest read_manifest(const Checkpoint& checkpoint, const std::filesystem::path& path);

/// Takes an attribute that resize_modules() does not set, such as a number of heads that a module of the user keeps: its path,
/// its name and its value as JSON text. Returns whether it did.
using SetAttribute = std::function<bool(const std::string&, const std::string&, const std::string&)>;

/// Cuts a freshly constructed model of the original class to the shapes of a file, sets options, and reads the values.
/// Returns the manifest, with which the model can be pruned and saved again.
/// Throws c10::ValueError, with the model as it was, for a file that load_safetensors() refuses or that has no manifest, for a
/// model whose shapes are not the original ones, for names or types that do not fit, and for attributes that nobody takes.
/// `set_attribute` is called when all else is known to fit; what it has set before it refuses another attribute stays.
RAREFY_API Manifest load_pruned(torch::nn::Module& model, const std::filesystem::path& path,
                                const SetAttribute& set_attribute = nullptr);

}  // namespace rarefy::pruning
