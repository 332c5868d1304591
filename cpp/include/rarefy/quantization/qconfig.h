#pragma once

#include <c10/core/ScalarType.h>
#include <rarefy/export.h>
#include <rarefy/quantization/scheme.h>

#include <optional>
#include <string>
#include <utility>
#include <vector>

namespace rarefy::quantization {

/// How a prepared layer computes its forward pass: on int8 kernels, or in floating point on values that lie on the grid.
enum class Execution { integer, simulated };

/// What one layer is quantized to. An unset scheme leaves that side in floating point.
struct LayerConfig {
  std::optional<Scheme> weight = std::nullopt;
  std::optional<Scheme> activation = std::nullopt;
  /// How activation ranges follow the data. Unset: MovingAverage(0.01) in prepare_qat, MinMax in prepare. Learned grids too.
  std::optional<Observer> observer = std::nullopt;
  /// How a weight's range is found: Latest (the default), MSE or HalfQuadratic; or a learned grid: LSQ, TQT, LearnedBits.
  std::optional<Observer> weight_observer = std::nullopt;

  /// Unset: integer where the schemes allow it (see why_not_integer).
  std::optional<Execution> execution = std::nullopt;
  /// The type that gradients are computed in: float32 or bfloat16.
  c10::ScalarType gradient_dtype = c10::ScalarType::Float;

  /// Throws c10::ValueError for a scheme that no layer can execute (a weight that is not symmetric and signed or whose
  /// channel axis is not 0, an activation per channel), for an observer that is not for activations (MSE, HalfQuadratic) or a
  /// weight_observer that is not for weights, and for a gradient_dtype that is neither float32 nor bfloat16.
  RAREFY_API void validate() const;
  /// Why a layer with these schemes cannot compute in integers; unset when it can.
  RAREFY_API std::optional<std::string> why_not_integer() const;
};

/// What a model is quantized to: a default, and overrides by name.
struct QConfig : LayerConfig {
  /// Name pattern (`*` and `?` as in a shell, matched against the whole dotted name) to configuration; no value keeps the
  /// layer in FP32. The last pattern that matches counts.
  std::vector<std::pair<std::string, std::optional<LayerConfig>>> overrides;
  /// Keep the first and the last layer with a weight in FP32, in the order in which the modules are registered. An override
  /// that matches one of them counts before this.
  bool first_last_fp32 = false;
  /// The runtime that the model is for (see target.h): prepare then refuses what it does not execute, and places quantizers
  /// as it wants them. Unset: none is chosen yet.
  std::optional<std::string> target;

  /// 8 bits on both sides: int8 symmetric per output channel [-127, 127] for weights, uint8 asymmetric per tensor for
  /// activations, what ONNX Runtime and oneDNN execute fastest on x86. For a target without zero points, int8 symmetric
  /// activations.
  ///
  /// reduce_range: weights of 7 bits, [-63, 63], whose products processors without VNNI instructions add without overflow.
  ///
  /// Throws c10::ValueError for an unknown target.
  RAREFY_API static QConfig int8(std::optional<std::string> target = std::nullopt, bool reduce_range = false);

  /// 8 bits on both sides, activations with a scale per token from the very tensor: no calibration, linear layers keep
  /// outliers of one token out of the others. Simulated.
  RAREFY_API static QConfig int8_dynamic();
  /// int4 weights in groups along the input features (axis 1), activations in floating point. Simulated.
  RAREFY_API static QConfig int4_weight_only(int64_t group_size = 128);
  /// E4M3 on both sides: weights per output channel, activations per tensor with an observed range. Simulated.
  RAREFY_API static QConfig fp8();
  /// MX blocks of 32 on both sides, E4M3 elements. Simulated.
  RAREFY_API static QConfig mxfp8();
  /// NVFP4 on both sides: FP4 in blocks of 16. Simulated.
  RAREFY_API static QConfig nvfp4();
  /// NF4 weights in blocks of 64, scales in 8 bits with double_quantized, activations in floating point. Simulated.
  RAREFY_API static QConfig nf4(bool double_quantized = true);

  /// The configuration of the layer called `name`; unset to keep it in FP32.
  RAREFY_API std::optional<LayerConfig> resolve(const std::string& name) const;
};

/// "integer", "simulated".
RAREFY_API std::string str(Execution execution);

/// True when the whole of `name` matches `pattern`, in which `*` stands for any text and `?` for one character.
RAREFY_API bool matches(const std::string& pattern, const std::string& name);

}  // namespace rarefy::quantization
