#pragma once

#include <rarefy/export.h>
#include <rarefy/ops/quantized.h>
#include <rarefy/quantization/fake_quantizer.h>
#include <rarefy/quantization/packed.h>
#include <rarefy/quantization/qconfig.h>
#include <torch/nn/cloneable.h>

#include <functional>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

namespace rarefy::nn {

/// The grid on which a converted layer hands its result on, as bytes: the input grid of the layers that read it. Buffers
/// scale (float32 [1]) and zero_point (int32 [1]); the integer q of a grid with qmin < 0 is stored as q + 128, so that bytes
/// are always uint8.
class RAREFY_API ByteGridImpl : public torch::nn::Cloneable<ByteGridImpl> {
 public:
  ByteGridImpl(int64_t smallest, int64_t greatest) : qmin(smallest), qmax(greatest) { ByteGridImpl::reset(); }
  void reset() override;
  void pretty_print(std::ostream& stream) const override;

  int64_t qmin, qmax;
  torch::Tensor scale, zero_point;
};
TORCH_MODULE(ByteGrid);

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

  /// A weight on its grid, and the bias that goes with it.
  struct Rounded {
    torch::Tensor weight, bias;
  };
  /// Whether `rounded` keeps what it is given: on during a calibration, without gradients.
  void keep(bool on);
  bool keeps() const { return keeps_; }
  /// make(), or while keep(true) its result of before, as long as no tensor of `sources`, from which it is made, was written to
  /// or replaced. Undefined tensors may be among them.
  Rounded rounded(const std::string& name, const std::vector<torch::Tensor>& sources,
                  const std::function<Rounded()>& make);
  /// The same for a weight by itself: through the quantizer called `name`.
  torch::Tensor rounded(const std::string& name, const torch::Tensor& weight);

  /// When set, told of every input of a prepared layer with one weight.
  std::function<void(const torch::Tensor&)> watch;

  /// The quantizers by name.
  const std::vector<std::pair<std::string, std::shared_ptr<quantization::FakeQuantizerImpl>>>& quantizers() const {
    return quantizers_;
  }
  /// The child `next`: the grid of the bytes that a converted layer gives; null where it gives floats.
  const std::shared_ptr<ByteGridImpl>& next() const { return next_; }
  void set_next(std::shared_ptr<ByteGridImpl> grid);
  /// Takes the quantizer called `name` away, if there is one.
  void remove(const std::string& name);

  /// Whether the tensor called `name` lies on a grid of bytes: integers of 8 bits or fewer.
  bool has_bytes(const std::string& name) const;
  /// The grid of the quantizer called `name`, which must be there, as the operators of converted layers take it.
  ops::ByteGrid grid(const std::string& name) const;
  /// The grid of the bytes to give; unset where the result is floating point.
  std::optional<ops::ByteGrid> output_grid() const;

 private:
  Specs specs_;
  std::vector<std::pair<std::string, std::shared_ptr<quantization::FakeQuantizerImpl>>> quantizers_;
  std::shared_ptr<ByteGridImpl> next_;

  struct Kept {
    std::vector<torch::Tensor> sources;
    std::vector<int64_t> versions;
    Rounded result;
  };
  bool keeps_ = false;
  std::map<std::string, Kept> kept_;
};
TORCH_MODULE(QuantState);

/// A trained weight as it is deployed.
struct IntegerWeight {
  torch::Tensor values;  // int8, shape of the weight
  torch::Tensor scale;   // float32 [out]
  torch::Tensor bias;    // float32 [out], or undefined
};

/// What a converted layer consists of.
struct ConvertedState {
  QuantStateImpl::Specs quantizers;
  torch::Tensor weight;  // int8; undefined where the layer has none
  torch::Tensor bias;    // float32 [out], or undefined
  bool relu = false;
  std::shared_ptr<ByteGridImpl> next;  // null where the result is floating point
  std::string target;                  // see Quantizable::target
  std::vector<std::pair<std::string, torch::Tensor>>
      tensors;                                               // of a layer with several weights: all of its own, by name
  std::optional<quantization::QuantizedTensorParts> packed;  // in place of the weight: codes and scales of a format
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
  /// Whether scales per channel of the weight are those of several groups; see TargetProfile::scales_of_groups.
  virtual bool has_scales_of_groups() const { return false; }
  /// The axis of an input of `dims` dimensions that has an index for each input channel; unset for layers that have no such axis.
  virtual std::optional<int64_t> input_axis(int64_t /*dims*/) const { return std::nullopt; }
  /// A value for each input channel, in a shape that broadcasts to the weight as its quantizer sees it.
  virtual torch::Tensor by_input(const torch::Tensor& values) const { return values; }
  /// "Linear", "Conv2d", ...
  virtual std::string kind() const = 0;
  /// Attaches the quantizers. Throws c10::ValueError unless the layer is floating.
  virtual void prepare(const quantization::LayerConfig& config, const quantization::Observer& default_observer) = 0;
  /// Replaces the weight by integers. The caller has checked that the quantizers are calibrated.
  virtual void convert() = 0;
  /// Makes a floating layer the converted one of that state: the tensors themselves, a batch normalization that the layer has
  /// gone, quantizers whose buffers the caller fills. The caller has checked that the shapes are those of the layer.
  virtual void restore(const ConvertedState& state) = 0;
  /// The names of the tensors of a converted layer that has several weights (LSTM: "weight_ih_l0", ...), or weights in floating
  /// point (LayerNorm); empty for others.
  virtual std::vector<std::string> tensor_names() const { return {}; }
  /// The shapes of those, where they are not those of the floating layer's parameters of the same names (MultiheadAttention).
  virtual std::map<std::string, std::vector<int64_t>> converted_shapes() const { return {}; }
  /// The codes and scales that a converted layer computes with in place of a weight; null for layers without.
  virtual const quantization::QuantizedTensorParts* packed_weight() const { return nullptr; }
  /// The quantizers, or null while floating.
  QuantStateImpl* quant_state() const { return quant.is_empty() ? nullptr : quant.ptr().get(); }

  /// Whether max(y, 0) is part of the layer, in every mode; off at first. Integer execution then has it for free, and
  /// training saves one bit per element for it. Embedding and Cat have none.
  bool relu() const { return relu_; }
  void set_relu(bool relu) { relu_ = relu; }

  QuantState quant{nullptr};
  /// How the configuration wants the layer to compute; see quantization::LayerConfig.
  std::optional<quantization::Execution> execution;
  c10::ScalarType gradient_dtype = c10::ScalarType::Float;
  /// The runtime that the layer was prepared for (quantization::QConfig::target); empty when none was chosen.
  std::string target;
  /// Why the layer stays in floating point, for report(); empty when nothing is known.
  std::string note;

 protected:
  /// What converted layers do last: onto the grid of `quant.output`, where a file gave the layer one.
  torch::Tensor with_output_grid(const torch::Tensor& y) const {
    return mode_ == Mode::converted ? quant->apply("output", y) : y;
  }

  Mode mode_ = Mode::floating;
  bool relu_ = false;
};

}  // namespace rarefy::nn
