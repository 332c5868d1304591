#pragma once

#include <rarefy/checkpoint.h>
#include <rarefy/export.h>
#include <rarefy/quantization/scheme.h>

#include <cstdint>
#include <filesystem>
#include <map>
#include <optional>
#include <set>
#include <string>
#include <vector>

// A converted model on the disk: a folder with
//
//   model.safetensors    every tensor of its state, integers as int8; one that has several names once
//   quantization.json    which layers compute with integers, and on which grids
//
// Both languages write and read it with these functions; save_quantized and load_quantized (rarefy/quantization/saved.h) go
// from and to models.
namespace rarefy::quantization {

/// The integers of a grid, from qmin to qmax.
struct IntegerRange {
  int64_t qmin = 0;
  int64_t qmax = 255;
  bool operator==(const IntegerRange&) const = default;
};

/// Whether layers of the kind have several weights, each with a grid of its own name: recurrent ones and attention.
RAREFY_API bool has_several_weights(const std::string& kind);

/// The quantizer of a tensor of a layer with several weights ("weight_ih_l0" of its own, "weight_query" of "q_proj_weight"); unset
/// for tensors that are none of its weights.
RAREFY_API std::optional<std::string> weight_quantizer(const std::string& kind, const std::string& tensor);

/// What a file says of a weight that is kept as codes and scales: `<layer>.weight_data`, `<layer>.weight_scale`, ... (see
/// rarefy/quantization/packed.h).
struct SavedPacking {
  Scheme scheme;
  std::vector<int64_t> shape;
  c10::ScalarType dtype = c10::kFloat;  // of the numbers that the codes stand for
  bool operator==(const SavedPacking&) const = default;
};

/// What a file says of one converted layer.
struct SavedLayer {
  /// "Linear", "Conv1d" to "Conv3d" (batch normalization folded in or not), "ConvTranspose1d" to "ConvTranspose3d",
  /// "Embedding", "Add", "Mul", "Cat", "LSTM", "GRU", "LSTMCell", "GRUCell", "MultiheadAttention", and those that one language alone has
  /// ("TransposedLinear").
  std::string kind;
  /// Whether max(y, 0) is part of the layer.
  bool relu = false;
  /// Whether the weight of a 2-d convolution lies channels-last in memory, and activations with it. Files are contiguous.
  bool channels_last = false;
  /// The grid of each tensor on one, by the name of its quantizer below `<layer>.quant`: "input", "input0", "input1",
  /// "weight", "output"; of a layer with several weights those of the weights ("weight_ih_l0"), of the input of each layer
  /// ("input_l0") and of each hidden state ("hidden_l0"); of attention those of the projections ("weight_query", "input_query") and of
  /// what its heads multiply ("query", "key", "probabilities", "value").
  std::map<std::string, Scheme> quantizers;
  /// The grid `<layer>.quant.next` of the bytes that the layer hands on; unset where it gives floats.
  std::optional<IntegerRange> next = std::nullopt;
  /// The runtime that the layer was prepared for (QConfig::target); empty when none was chosen.
  std::string target;
  /// Set where codes and scales of a format take the place of an int8 weight, which has a quantizer otherwise.
  std::optional<SavedPacking> packed = std::nullopt;

  bool operator==(const SavedLayer&) const = default;
};

/// What the folder holds.
struct QuantizedCheckpoint {
  /// By dotted name; a layer that the model holds under several names under each.
  std::map<std::string, SavedLayer> layers;
  /// The batch normalizations of the float model that are part of integer weights: their names. Nothing is left of them.
  std::set<std::string> folded;
  /// Every tensor of the state; one that has several names is the same tensor under each.
  NamedTensors tensors;

  /// Throws c10::ValueError, which begins with `context` and names the layer, unless every layer has its tensors, of the
  /// types and shapes that its grids want, with finite positive scales, and integers and zero points inside of the grid.
  RAREFY_API void validate(const std::string& context) const;
};

/// Writes a folder. It is written under another name beside `folder` and takes its place once it is complete and on the
/// disk, so that a failure leaves what was there.
/// Throws c10::ValueError for a checkpoint that is not valid, and when `folder` is no folder or holds files of other names,
/// which would be lost; c10::Error when it cannot be written.
RAREFY_API void write_quantized(const QuantizedCheckpoint& checkpoint, const std::filesystem::path& folder);

/// Reads a folder. Everything is checked: the format's version, the size and the checksum of model.safetensors, and what
/// QuantizedCheckpoint::validate() checks. Nothing in the files runs.
/// Throws c10::ValueError that names the file, the layer and the broken rule; c10::Error when a file cannot be read.
RAREFY_API QuantizedCheckpoint read_quantized(const std::filesystem::path& folder);

}  // namespace rarefy::quantization
