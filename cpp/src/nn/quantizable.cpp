#include <rarefy/nn/quantizable.h>

#include <ostream>

namespace rarefy::nn {

void ByteGridImpl::reset() {
  scale = register_buffer("scale", torch::ones({1}));
  zero_point = register_buffer("zero_point", torch::full({1}, qmin, torch::kInt32));
}

void ByteGridImpl::pretty_print(std::ostream& stream) const {
  stream << "rarefy::nn::ByteGrid([" << qmin << ", " << qmax << "])";
}

QuantStateImpl::QuantStateImpl(Specs specs) : specs_(std::move(specs)) { QuantStateImpl::reset(); }

void QuantStateImpl::reset() {
  quantizers_.clear();
  for (const auto& [name, options] : specs_) {
    quantizers_.emplace_back(name, register_module(name, quantization::FakeQuantizer(options)));
  }
  if (next_ != nullptr) {
    next_ = register_module("next", std::make_shared<ByteGridImpl>(next_->qmin, next_->qmax));
  }
}

void QuantStateImpl::set_next(std::shared_ptr<ByteGridImpl> grid) {
  if (next_ != nullptr) {
    unregister_module("next");
  }
  next_ = std::move(grid);
  if (next_ != nullptr) {
    register_module("next", next_);
  }
}

void QuantStateImpl::remove(const std::string& name) {
  if (find(name) == nullptr) {
    return;
  }
  unregister_module(name);
  std::erase_if(quantizers_, [&](const auto& item) { return item.first == name; });
  std::erase_if(specs_, [&](const auto& item) { return item.first == name; });
}

void QuantStateImpl::pretty_print(std::ostream& stream) const { stream << "rarefy::nn::QuantState"; }

quantization::FakeQuantizerImpl* QuantStateImpl::find(const std::string& name) const {
  for (const auto& [key, quantizer] : quantizers_) {
    if (key == name) {
      return quantizer.get();
    }
  }
  return nullptr;
}

bool QuantStateImpl::has_bytes(const std::string& name) const {
  const auto* quantizer = find(name);
  return quantizer != nullptr && quantizer->options.scheme.is_plain() && quantizer->options.scheme.bits <= 8;
}

ops::ByteGrid QuantStateImpl::grid(const std::string& name) const {
  const auto& quantizer = *find(name);
  return {quantizer.scale, quantizer.zero_point, quantizer.options.scheme.qmin(), quantizer.options.scheme.qmax()};
}

std::optional<ops::ByteGrid> QuantStateImpl::output_grid() const {
  return next_ == nullptr ? std::nullopt
                          : std::optional(ops::ByteGrid{next_->scale, next_->zero_point, next_->qmin, next_->qmax});
}

torch::Tensor QuantStateImpl::apply(const std::string& name, const torch::Tensor& x) const {
  auto* quantizer = find(name);
  return quantizer == nullptr ? x : quantizer->forward(x);
}

}  // namespace rarefy::nn
