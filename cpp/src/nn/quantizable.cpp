#include <rarefy/nn/quantizable.h>

#include <algorithm>
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
  for (size_t i = 0; i < quantizers_.size(); ++i) {  // of a copy: what has become of them
    if (const auto& options = quantizers_[i].second->options; !quantization::is_learned(options.observer)) {
      specs_[i].second = options;
    }
  }
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

void QuantStateImpl::keep(bool on) {
  keeps_ = on;
  kept_.clear();
}

QuantStateImpl::Rounded QuantStateImpl::rounded(const std::string& name, const std::vector<torch::Tensor>& sources,
                                                const std::function<Rounded()>& make) {
  // Inference tensors count no writes.
  const auto counts = [](const torch::Tensor& t) { return !t.defined() || !t.is_inference(); };
  if (!keeps_ || !std::all_of(sources.begin(), sources.end(), counts)) {
    return make();
  }
  std::vector<int64_t> versions;
  for (const auto& source : sources) {
    versions.push_back(source.defined() ? static_cast<int64_t>(source._version()) : 0);
  }
  const auto same = [](const torch::Tensor& a, const torch::Tensor& b) { return a.is_same(b); };
  if (const auto found = kept_.find(name);
      found != kept_.end() && found->second.versions == versions &&
      std::equal(sources.begin(), sources.end(), found->second.sources.begin(), found->second.sources.end(), same)) {
    return found->second.result;
  }
  auto result = make();
  kept_[name] = {sources, std::move(versions), result};
  return result;
}

torch::Tensor QuantStateImpl::rounded(const std::string& name, const torch::Tensor& weight) {
  return rounded(name, {weight}, [&] { return Rounded{apply(name, weight), {}}; }).weight;
}

}  // namespace rarefy::nn
