#pragma once

#include <rarefy/nn/quantizable.h>
#include <rarefy/ops/relu.h>

namespace rarefy::nn {

/// An operation without weights on quantized inputs: what Add, Mul and Cat share.
template <typename Derived>
class OperationModule : public torch::nn::Cloneable<Derived>, public Quantizable {
 public:
  void reset() override {
    if (!specs_.empty()) {
      quant = this->register_module("quant", QuantState(specs_));
    }
  }

  void prepare(const quantization::LayerConfig& config, const quantization::Observer& default_observer) override {
    TORCH_CHECK_VALUE(mode_ == Mode::floating, "[prepare] ", kind(),
                      " must be floating point, but is already prepared");
    if (!config.activation.has_value()) {
      return;
    }
    for (const auto& name : inputs()) {
      specs_.push_back({name, {*config.activation, config.observer.value_or(default_observer), 1}});
    }
    quant = this->register_module("quant", QuantState(specs_));
    quant->train(this->is_training());
    mode_ = Mode::prepared;
  }

  /// Add and Cat compute on integers from here on; a product of two activations stays simulated.
  void convert() override { mode_ = Mode::converted; }

  void restore(const ConvertedState& state) override {
    TORCH_CHECK_VALUE(mode_ == Mode::floating, "[restore] ", kind(), " must be floating point");
    specs_ = state.quantizers;
    quant = this->register_module("quant", QuantState(specs_));
    quant->set_next(state.next);
    quant->train(this->is_training());
    relu_ = state.relu;
    target = state.target;
    mode_ = Mode::converted;
  }

 protected:
  /// The names of the quantizers.
  virtual std::vector<std::string> inputs() const { return {"input0", "input1"}; }
  torch::Tensor quantized(const std::string& name, const torch::Tensor& x) const {
    return mode_ == Mode::floating ? x : quant->apply(name, x);
  }

  torch::Tensor finished(const torch::Tensor& y) const { return with_output_grid(relu() ? ops::relu(y) : y); }

 private:
  QuantStateImpl::Specs specs_;
};

/// a + b, the residual addition. Prepared, both inputs are quantized, each with its own parameters
/// (`quant.input0`, `quant.input1`), as integer runtimes do; for a target that adds in the epilogue of the layer before it
/// (quantization::Residual::identity) only the second input is, so that the layer's result goes first and the identity second.
class RAREFY_API AddImpl : public OperationModule<AddImpl> {
 public:
  void pretty_print(std::ostream& stream) const override;
  std::string kind() const override { return "Add"; }
  /// a and b of one shape, or broadcastable.
  torch::Tensor forward(const torch::Tensor& a, const torch::Tensor& b);
  /// The names of the inputs that prepare quantizes.
  std::vector<std::string> quantized_inputs = {"input0", "input1"};

 protected:
  std::vector<std::string> inputs() const override { return quantized_inputs; }
};
TORCH_MODULE(Add);

}  // namespace rarefy::nn
