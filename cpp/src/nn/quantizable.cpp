#include <rarefy/nn/add.h>
#include <rarefy/nn/quantizable.h>

#include <ostream>

namespace rarefy::nn {

QuantStateImpl::QuantStateImpl(Specs specs) : specs_(std::move(specs)) { QuantStateImpl::reset(); }

void QuantStateImpl::reset() {
  for (const auto& [name, options] : specs_) {
    register_module(name, quantization::FakeQuantizer(options));
  }
}

void QuantStateImpl::pretty_print(std::ostream& stream) const { stream << "rarefy::nn::QuantState"; }

quantization::FakeQuantizerImpl* QuantStateImpl::find(const std::string& name) const {
  for (const auto& child : named_children()) {
    if (child.key() == name) {
      return child.value()->as<quantization::FakeQuantizerImpl>();
    }
  }
  return nullptr;
}

torch::Tensor QuantStateImpl::apply(const std::string& name, const torch::Tensor& x) const {
  auto* quantizer = find(name);
  return quantizer == nullptr ? x : quantizer->forward(x);
}

void AddImpl::reset() {
  if (!specs_.empty()) {
    quant = register_module("quant", QuantState(specs_));
  }
}

void AddImpl::pretty_print(std::ostream& stream) const { stream << "rarefy::nn::Add()"; }

void AddImpl::prepare(const quantization::LayerConfig& config, const quantization::Observer& default_observer) {
  TORCH_CHECK_VALUE(mode_ == Mode::floating, "[prepare] Add must be floating point, but is already prepared");
  if (!config.activation.has_value()) {
    return;
  }
  for (const char* name : {"input0", "input1"}) {
    specs_.push_back({name, {*config.activation, config.observer.value_or(default_observer), 1}});
  }
  quant = register_module("quant", QuantState(specs_));
  quant->train(is_training());
  mode_ = Mode::prepared;
}

torch::Tensor AddImpl::forward(const torch::Tensor& a, const torch::Tensor& b) {
  if (mode_ == Mode::floating) {
    return a + b;
  }
  return quant->apply("input0", a) + quant->apply("input1", b);
}

}  // namespace rarefy::nn
