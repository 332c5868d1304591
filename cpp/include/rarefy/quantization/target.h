#pragma once

#include <rarefy/export.h>
#include <rarefy/quantization/qconfig.h>

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

namespace rarefy::quantization {

/// Where a clipping activation (ReLU, ReLU6) before a quantizer goes in a file.
enum class Clipping {
  keep,      ///< stays where it is; the runtime fuses it with the operator before it
  saturate,  ///< goes where the integer type saturates at the same values, and stays elsewhere
  integers,  ///< goes, and a Clip of the integers takes its place where they do not saturate by themselves
};

/// Which inputs of a residual addition are quantized.
enum class Residual {
  both,
  /// Only the branch that does not come straight from a layer with a weight: that layer takes the addition as its epilogue.
  identity,
};

/// What a runtime executes in integers, and where it wants the quantizers: one row of data for each target. What prepare
/// checks, where it places quantizers, and what the writers of files do all follow from it.
struct TargetProfile {
  /// As in QConfig::target: "onnxruntime", "openvino", "tensorrt", "qnn".
  std::string name;

  /// Families of layers that run in integers: "linear", "conv", "embedding", "add", "mul", "cat", "recurrent",
  /// "conv_transpose", "boundary" (normalizations and activation functions), "attention". Others stay in FP32.
  std::vector<std::string> families;
  /// Families that files may hold on their grids, with integer weights, though the runtime computes with them in floating point.
  std::vector<std::string> stored = {};
  /// Families whose weights may have a scale per channel; the others get one scale.
  std::vector<std::string> per_channel;
  /// Whether the channels of every group of a transposed convolution may have scales of their own: in a file, a Reshape then
  /// stands between its integers and the operator. Otherwise such a weight gets one scale.
  bool scales_of_groups = false;
  /// Widths of activations.
  std::vector<int64_t> activation_bits;
  /// Whether files may hold activations of 16 bits, executed or not.
  bool wide_activations = true;
  /// Whether grids that do not fill their type (fewer bits, [-127, 127]) can be held: by a Clip of the integers.
  bool narrow_grids = false;
  /// Activations are written as uint8 or uint16: a signed zero point z as z + 2^(bits-1), which changes no value.
  bool unsigned_activations = true;
  /// Whether zero points other than 0 exist. Without them activations are symmetric and signed.
  bool zero_points = true;
  /// Whether the zero point of symmetric weights is written (all zeros) or left out.
  bool weight_zero_points = true;
  /// Whether 4-bit weights of layers with a float input are stored as INT4 (from opset 21 on).
  bool int4_weights = false;

  /// Whether files may hold formats beside plain grids: scales in groups and blocks or from the tensor itself, minifloats, MX,
  /// NVFP4, NF4, codebooks. All of them, or what explicit quantization has: "all", "explicit", "none".
  std::string formats = "none";

  Residual residual = Residual::both;
  /// Whether a result that only floating-point operations read gets a quantizer of its own.
  bool quantizes_outputs = true;
  /// Whether normalizations and activation functions compute on integers, so that their inputs get quantizers too.
  bool boundary_inputs = false;
  /// Whether a quantizer behind an operator that only moves values (max pooling, reshaping) is repeated before it.
  bool quantizes_before_moves = true;
  Clipping clipping = Clipping::keep;
  /// Whether the bias of a linear layer is written so that no fusion makes its product float: in a Gemm where the product is
  /// 2-D and quantized, as Sum elsewhere.
  bool splits_linear_bias = false;
  /// Whether the mean over both image axes is written as GlobalAveragePool.
  bool pools_means = false;
  /// Whether a residual before a layer normalization is written as Sum, so that both stay apart.
  bool residual_as_sum = false;

  /// Whether inputs may have axes of any size.
  bool dynamic_shapes = true;

  /// ONNX operator sets: the oldest that is written, and the one that is written when none is asked for.
  int64_t oldest_opset = 13;
  int64_t default_opset = 21;

  /// Whether layers of the kind ("Linear", "Conv2d", "ConvBn2d", "Add", ...) run in integers.
  RAREFY_API bool executes(const std::string& kind) const;
  /// Whether files may hold layers of the kind on their grids.
  RAREFY_API bool stores(const std::string& kind) const;
  /// Whether weights of the kind may have a scale per channel.
  RAREFY_API bool has_per_channel(const std::string& kind) const;
  /// The configuration with one scale for the weight where the target knows no scales per channel for the kind.
  RAREFY_API LayerConfig adapt(LayerConfig config, const std::string& kind) const;
  /// Why the runtime does not execute a layer of the kind with these schemes: the rule and the value; unset when it does.
  /// What adapt() changes is no reason.
  RAREFY_API std::optional<std::string> why_not(const LayerConfig& config, const std::string& kind) const;
  /// Why no file for the runtime can hold activations on this grid; unset when it can. Weaker than why_not: a file for ONNX
  /// Runtime may hold 4-bit activations, from which it has no gain.
  RAREFY_API std::optional<std::string> why_not_written(const Scheme& activation) const;
  /// Why no file for the runtime can hold weights of this scheme; unset when it can.
  RAREFY_API std::optional<std::string> why_weight_not_written(const Scheme& weight) const;
};

/// The profile of a target. Throws c10::ValueError, naming the known ones, for another name.
RAREFY_API const TargetProfile& target_profile(const std::string& name);
/// The names that target_profile knows.
RAREFY_API std::vector<std::string> target_names();

/// "linear", "conv", "conv_transpose", "embedding", "recurrent", "boundary", "attention", "add", "mul" or "cat": the family of a kind of layer. Throws c10::ValueError for another.
RAREFY_API std::string layer_family(const std::string& kind);

/// "keep", "saturate", "integers".
RAREFY_API std::string str(Clipping clipping);
/// "both", "identity".
RAREFY_API std::string str(Residual residual);

}  // namespace rarefy::quantization
