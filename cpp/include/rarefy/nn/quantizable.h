#pragma once

#include <rarefy/export.h>
#include <rarefy/quantization/fake_quantizer.h>
#include <rarefy/quantization/qconfig.h>
#include <torch/nn/cloneable.h>

#include <optional>
#include <string>
#include <utility>
#include <vector>

namespace rarefy::nn {

/// The fake quantizers of one layer, registered under its child `quant`: `<layer>.quant.input.scale` and so on.
class RAREFY_API QuantStateImpl : public torch::nn::Cloneable<QuantStateImpl> {
 public:
  using Specs = std::vector<std::pair<std::string, quantization::FakeQuantizerOptions>>;

  explicit QuantStateImpl(Specs specs);
  void reset() override;
  void pretty_print(std::ostream& stream) const override;

  /// The quantizer called `name`, or null when that tensor stays in floating point.
  quantization::FakeQuantizerImpl* find(const std::string& name) const;
  /// x through the quantizer called `name`; x itself when there is none.
  torch::Tensor apply(const std::string& name, const torch::Tensor& x) const;

 private:
  Specs specs_;
};
TORCH_MODULE(QuantState);

/// A trained weight as it is deployed.
struct IntegerWeight {
  torch::Tensor values;  // int8, shape of the weight
  torch::Tensor scale;   // float32 [out]
  torch::Tensor bias;    // float32 [out], or undefined
};

/// A layer that is floating point until `prepare` switches it on, and integer after `convert`. In C++ a typed member of a
/// model cannot be replaced, so the layer itself switches.
class RAREFY_API Quantizable {
 public:
  enum class Mode { floating, prepared, converted };

  virtual ~Quantizable() = default;

  Mode mode() const { return mode_; }
  /// Whether the layer has a weight; Add has none.
  virtual bool has_weight() const { return false; }
  /// "Linear", "Conv2d", ...
  virtual std::string kind() const = 0;
  /// Attaches the quantizers. Throws c10::ValueError unless the layer is floating.
  virtual void prepare(const quantization::LayerConfig& config, const quantization::Observer& default_observer) = 0;
  /// Replaces the weight by integers. The caller has checked that the quantizers are calibrated.
  virtual void convert() = 0;
  /// The quantizers, or null while floating.
  QuantStateImpl* quant_state() const { return quant.is_empty() ? nullptr : quant.ptr().get(); }

  QuantState quant{nullptr};
  /// How the configuration wants the layer to compute; see quantization::LayerConfig.
  std::optional<quantization::Execution> execution;
  c10::ScalarType gradient_dtype = c10::ScalarType::Float;
  /// The runtime that the layer was prepared for (quantization::QConfig::target); empty when none was chosen.
  std::string target;
  /// Why the layer stays in floating point, for report(); empty when nothing is known.
  std::string note;

 protected:
  Mode mode_ = Mode::floating;
};

}  // namespace rarefy::nn
