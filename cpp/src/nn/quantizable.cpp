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

}  // namespace rarefy::nn
