#pragma once

#include <rarefy/export.h>
#include <rarefy/quantization/scheme.h>

#include <optional>
#include <string>
#include <utility>
#include <vector>

namespace rarefy::quantization {

/// What one layer is quantized to. An unset scheme leaves that side in floating point.
struct LayerConfig {
  std::optional<Scheme> weight;
  std::optional<Scheme> activation;
  /// How activation ranges follow the data. Unset: MovingAverage(0.01) in prepare_qat, MinMax in prepare.
  std::optional<Observer> observer;

  /// Throws c10::ValueError for a scheme that no layer can execute: a weight that is not symmetric and signed or whose
  /// channel axis is not 0, an activation per channel.
  RAREFY_API void validate() const;
};

/// What a model is quantized to: a default, and overrides by name.
struct QConfig : LayerConfig {
  /// Name pattern (`*` and `?` as in a shell, matched against the whole dotted name) to configuration; no value keeps the
  /// layer in FP32. The last pattern that matches counts.
  std::vector<std::pair<std::string, std::optional<LayerConfig>>> overrides;

  /// 8 bits on both sides: int8 symmetric per output channel [-127, 127] for weights, uint8 asymmetric per tensor for
  /// activations. What ONNX Runtime and oneDNN execute fastest on x86.
  RAREFY_API static QConfig int8();

  /// The configuration of the layer called `name`; unset to keep it in FP32.
  RAREFY_API std::optional<LayerConfig> resolve(const std::string& name) const;
};

/// True when the whole of `name` matches `pattern`, in which `*` stands for any text and `?` for one character.
RAREFY_API bool matches(const std::string& pattern, const std::string& name);

}  // namespace rarefy::quantization
