#pragma once

#include <rarefy/nn/quantizable.h>
#include <rarefy/ops/integer.h>
#include <rarefy/ops/quantized.h>
#include <rarefy/ops/relu.h>
#include <rarefy/quantization/packed_weight.h>

namespace rarefy::nn {

/// What the layers with a weight share: a weight and a bias that are parameters while floating or prepared, and buffers
/// (int8 and float32) once converted. A weight in a format without integer kernels (groups, blocks, minifloats, NF4, ...) becomes
/// the buffers of its codes and scales instead (`weight_data`, `weight_scale`, ...: rarefy/quantization/packed.h), and has no
/// quantizer any more: it is floating point where it is multiplied. Derived gives the arithmetic.
template <typename Derived>
class WeightedModule : public torch::nn::Cloneable<Derived>, public Quantizable {
 public:
  void reset() override {
    if (mode_ == Mode::converted) {
      register_converted();
    } else {
      register_floating();
    }
    if (!specs_.empty() || packed_.has_value()) {
      quant = this->register_module("quant", QuantState(specs_));
    }
  }

  bool has_weight() const override { return true; }

  void prepare(const quantization::LayerConfig& config, const quantization::Observer& default_observer) override {
    TORCH_CHECK_VALUE(mode_ == Mode::floating, "[prepare] ", kind(),
                      " must be floating point, but is already prepared");
    if (!config.weight.has_value()) {
      return;
    }
    if (config.activation.has_value() && quantizes_input()) {
      specs_.push_back({"input", {*config.activation, config.observer.value_or(default_observer), 1}});
    }
    auto scheme = *config.weight;
    if (scheme.axis().has_value()) {
      scheme.granularity = quantization::PerChannel{channel_axis()};
    }
    specs_.push_back({"weight",
                      {scheme, config.weight_observer.value_or(quantization::Latest{}), channels(),
                       by_channel(weight).sizes().vec()}});
    quant = this->register_module("quant", QuantState(specs_));
    quant->train(this->is_training());
    quant->to(weight.device());
    execution = config.execution;
    gradient_dtype = config.gradient_dtype;
    float_reason_ = why_never_integer(config);
    mode_ = Mode::prepared;
  }

  /// The trained integers, with batch normalization folded in where there is one.
  IntegerWeight integer_weight() {
    TORCH_CHECK_VALUE(mode_ == Mode::prepared, "[integer_weight] ", kind(), " must be prepared");
    const torch::NoGradGuard no_grad;
    auto [folded_weight, folded_bias] = folded();
    auto* quantizer = quant->find("weight");
    const auto laid_out = by_channel(folded_weight);
    if (quantizer->observe) {
      quantizer->forward(laid_out);
    }
    quantizer->settle_bits();
    return {as_stored(quantizer->quantize_to_integer(laid_out)), quantizer->scale.expand({channels()}).contiguous(),
            folded_bias.defined() ? folded_bias.detach().to(torch::kFloat32) : folded_bias};
  }

  void convert() override {
    if (packs_weight()) {
      const auto [parts, float_bias] = pack_weight();
      become_packed(parts, float_bias);
      return;
    }
    for (const auto& [name, quantizer] : quant->quantizers()) {
      if (!quantizer->options.scheme.is_plain()) {  // stays as it is, simulated
        return;
      }
    }
    auto integers = integer_weight();
    become_integer(integers.values, integers.bias);
  }

  void restore(const ConvertedState& state) override {
    TORCH_CHECK_VALUE(mode_ == Mode::floating, "[restore] ", kind(), " must be floating point");
    specs_ = state.quantizers;
    quant = this->register_module("quant", QuantState(specs_));
    quant->set_next(state.next);
    quant->train(this->is_training());
    quant->to(weight.device());
    relu_ = state.relu;
    target = state.target;
    if (state.packed.has_value()) {
      become_packed(*state.packed, state.bias);
    } else {
      become_integer(state.weight, state.bias);
    }
  }

  const quantization::QuantizedTensorParts* packed_weight() const override {
    return packed_.has_value() ? &*packed_ : nullptr;
  }

  /// The axis of the weight, laid out by channel, that has an index for each output channel.
  virtual int64_t channel_axis() const { return 0; }
  /// The number of output channels.
  virtual int64_t channels() const { return weight.size(0); }

  /// Parameter (floating point) until converted; then a buffer of int8, or undefined where the weight is packed.
  torch::Tensor weight;
  /// Parameter until converted; then a buffer of float32. Undefined without bias.
  torch::Tensor bias;

 protected:
  virtual void register_floating() = 0;
  virtual bool quantizes_input() const { return true; }
  /// The layer's arithmetic, in floating point, on values that may lie on a grid.
  virtual torch::Tensor compute(const torch::Tensor& x, const torch::Tensor& w, const torch::Tensor& b) = 0;
  /// The prepared layer in integers, weight and result in floating point: the weight is quantized as w * factor and the
  /// result divided by factor again where there is one.
  virtual torch::Tensor compute_integer(const torch::Tensor& /*x*/, const torch::Tensor& /*w*/,
                                        const torch::Tensor& /*factor*/, const torch::Tensor& /*b*/,
                                        const ops::IntegerGrids& /*grids*/, const ops::IntegerOptions& /*options*/) {
    TORCH_CHECK_NOT_IMPLEMENTED(false, "[", kind(), "] has no integer kernel");
  }
  /// Why no input of the layer can be computed with in integers while it trains; unset when it can.
  virtual std::optional<std::string> why_never_integer(const quantization::LayerConfig& config) const {
    if (auto reason = config.why_not_integer()) {
      return reason;
    }
    const int64_t products = weight.numel() / channels();
    if (products > ops::kLongestSum) {
      return "int32 does not hold sums of " + std::to_string(products) + " products";
    }
    return ops::has_exact_integer_products()
               ? std::nullopt
               : std::optional<std::string>("the processor sums products of bytes in 16 bits");
  }
  /// Whether the layer trains in integers where the configuration leaves it open: where they are not slower.
  virtual bool trains_in_integers_by_default() const { return true; }
  virtual bool has_integer_kernel_on(c10::DeviceType device) const { return device == c10::DeviceType::CPU; }
  /// The converted layer in integers, ReLU included.
  virtual torch::Tensor execute(const torch::Tensor& x) = 0;
  /// The layer in floating point and prepared, without ReLU.
  virtual torch::Tensor run_floating(const torch::Tensor& x) { return compute(x, weight, bias); }
  virtual torch::Tensor run_prepared(const torch::Tensor& x) {
    if (trains_in_integers(x)) {
      return compute_integer(x, weight, {}, bias, grids_for(x, weight), integer_options());
    }
    const auto input = quant->apply("input", x);
    const auto [w, b] = rounded();
    return compute(input, w, b);
  }
  /// The weight with the output channels on channel_axis(), and back, for layers that store them otherwise.
  virtual torch::Tensor by_channel(const torch::Tensor& w) const { return w; }
  virtual torch::Tensor as_stored(const torch::Tensor& w) const { return w; }
  /// The float weight and bias that are quantized.
  virtual std::pair<torch::Tensor, torch::Tensor> folded() { return {weight, bias}; }
  /// The tensors that folded() reads.
  virtual std::vector<torch::Tensor> sources() const { return {weight, bias}; }
  /// The weight on its grid and the bias: folded() as evaluation computes with it.
  QuantStateImpl::Rounded rounded() {
    return quant->rounded("weight", sources(), [this] {
      const auto [w, b] = folded();
      return QuantStateImpl::Rounded{as_stored(quant->apply("weight", by_channel(w))), b};
    });
  }
  /// The layer with the weight of those, on values that may lie on a grid.
  virtual torch::Tensor compute_packed(const torch::Tensor& x, const quantization::QuantizedTensorParts& w,
                                       const torch::Tensor& b) {
    return compute(x, as_stored(quantization::dequantize_packed(w)), b);
  }
  /// Called by convert() and restore() while the layer does not yet count as converted.
  virtual void after_convert() {}

  /// The layer in the mode that it is in.
  torch::Tensor run(const torch::Tensor& x) {
    if (packed_.has_value()) {
      const auto y = compute_packed(quant->apply("input", x), *packed_, bias);
      return this->with_output_grid(relu_ ? ops::relu(y) : y);
    }
    if (mode_ == Mode::converted && executes_integers()) {
      return this->with_output_grid(execute(x));
    }
    if (mode_ == Mode::prepared && quant->watch) {
      quant->watch(x);
    }
    auto y = mode_ == Mode::floating   ? run_floating(x)
             : mode_ == Mode::prepared ? run_prepared(x)
                                       : compute(quant->apply("input", x), dequantized_weight(), bias);
    if (relu_) {
      y = mode_ == Mode::prepared && quant->keeps() ? y.clamp_min_(0) : ops::relu(y);
    }
    return this->with_output_grid(y);
  }

  /// Takes over the parameters of another layer: the tensors themselves.
  void adopt(const torch::Tensor& given_weight, const torch::Tensor& given_bias) {
    weight = this->parameters_["weight"] = given_weight;
    if (given_bias.defined()) {
      bias = this->parameters_["bias"] = given_bias;
    }
  }

  bool executes_integers() const { return quant->has_bytes("input"); }

  /// Whether a prepared layer computes with this input in integers. Throws c10::ValueError when it must and cannot.
  bool trains_in_integers(const torch::Tensor& x) const {
    const auto *input = quant->find("input"), *w = quant->find("weight");
    if (execution == quantization::Execution::simulated || input == nullptr || !input->quantize || !w->quantize ||
        (!execution.has_value() && !trains_in_integers_by_default())) {
      return false;
    }
    std::string reason = float_reason_.value_or("");
    if (reason.empty() && x.scalar_type() == torch::kFloat64) {
      reason = "float64 has no integer kernels";
    }
    if (reason.empty() && !has_integer_kernel_on(x.device().type())) {
      reason = "there are no integer kernels on " + x.device().str();
    }
    TORCH_CHECK_VALUE(reason.empty() || execution != quantization::Execution::integer, "[", kind(),
                      "] execution = integer must be possible for its input, but ", reason);
    return reason.empty();
  }

  /// Observes input and weight, and says how they are rounded.
  ops::IntegerGrids grids_for(const torch::Tensor& x, const torch::Tensor& w, const torch::Tensor& factor = {}) {
    auto *input = quant->find("input"), *weights = quant->find("weight");
    input->update(x);
    weights->update(by_channel(w), factor);
    const auto &xs = input->options.scheme, &ws = weights->options.scheme;
    return {input->scale,   input->zero_point,   xs.qmin(), xs.qmax(),
            weights->scale, weights->zero_point, ws.qmin(), ws.qmax()};
  }

  ops::IntegerOptions integer_options(bool relu = false) const {
    return {relu, gradient_dtype == c10::ScalarType::BFloat16, std::nullopt};
  }

  /// A scale for every output channel, or one; as the quantizer has it, so that a loaded checkpoint's holds.
  torch::Tensor weight_scale() const { return quant->find("weight")->scale; }

  /// The float weight of the integers, for layers whose input stays in floating point.
  torch::Tensor dequantized_weight() {
    std::vector<int64_t> shape(static_cast<size_t>(weight.dim()), 1);
    shape[static_cast<size_t>(channel_axis())] = channels();
    return as_stored(by_channel(weight).to(torch::kFloat32) *
                     quant->find("weight")->scale.expand({channels()}).view(shape));
  }

  std::optional<torch::Tensor> optional_bias() const { return bias.defined() ? std::optional(bias) : std::nullopt; }

  QuantStateImpl::Specs specs_;

 private:
  void become_integer(const torch::Tensor& values, const torch::Tensor& float_bias) {
    this->parameters_.erase("weight");
    if (bias.defined()) {
      this->parameters_.erase("bias");
    }
    weight = this->register_buffer("weight", values);
    bias = float_bias.defined() ? this->register_buffer("bias", float_bias) : torch::Tensor();
    after_convert();
    mode_ = Mode::converted;
  }

  bool packs_weight() const {
    const auto& scheme = quant->find("weight")->options.scheme;
    return !scheme.is_plain() && scheme.rounding == quantization::Rounding::nearest_even;
  }

  /// Codes and scales of the trained weight, and the bias, with batch normalization folded in.
  std::pair<quantization::QuantizedTensorParts, torch::Tensor> pack_weight() {
    const torch::NoGradGuard no_grad;
    const auto [folded_weight, folded_bias] = folded();
    const auto laid_out = by_channel(folded_weight);
    auto* quantizer = quant->find("weight");
    if (quantizer->observe) {
      quantizer->forward(laid_out);
    }
    const auto& scheme = quantizer->options.scheme;
    const auto scale = quantizer->codebook.defined() ? quantizer->codebook : quantizer->scale;
    auto parts = scheme.dynamic ? quantization::quantize_to(laid_out, scheme)
                                : quantization::quantize_to(laid_out, scheme, scale, quantizer->zero_point);
    for (auto& [name, tensor] : parts.tensors) {
      tensor = tensor.to(laid_out.device());
    }
    return {parts, folded_bias.defined() ? folded_bias.detach().clone() : folded_bias};
  }

  void become_packed(const quantization::QuantizedTensorParts& parts, const torch::Tensor& float_bias) {
    this->parameters_.erase("weight");
    if (bias.defined()) {
      this->parameters_.erase("bias");
    }
    weight = torch::Tensor();
    bias = float_bias.defined() ? this->register_buffer("bias", float_bias) : torch::Tensor();
    packed_ = parts;
    for (auto& [name, tensor] : packed_->tensors) {
      tensor = this->register_buffer("weight_" + name, tensor);
    }
    quant->remove("weight");
    std::erase_if(specs_, [](const auto& item) { return item.first == "weight"; });
    after_convert();
    mode_ = Mode::converted;
  }

  void register_converted() {
    if (packed_.has_value()) {
      for (auto& [name, tensor] : packed_->tensors) {
        tensor = this->register_buffer("weight_" + name, torch::empty_like(tensor));
      }
      if (bias.defined()) {
        bias = this->register_buffer("bias", torch::empty_like(bias));
      }
      return;
    }
    weight = this->register_buffer("weight", torch::empty_like(weight));
    if (bias.defined()) {
      bias = this->register_buffer("bias", torch::empty_like(bias));
    }
  }

  std::optional<std::string> float_reason_;
  std::optional<quantization::QuantizedTensorParts> packed_;  // its tensors are buffers
};

}  // namespace rarefy::nn
