#include <ATen/ops/gelu.h>
#include <ATen/ops/group_norm.h>
#include <ATen/ops/hardswish.h>
#include <ATen/ops/layer_norm.h>
#include <ATen/ops/ones.h>
#include <ATen/ops/rms_norm.h>
#include <ATen/ops/silu.h>
#include <ATen/ops/softmax.h>
#include <ATen/ops/zeros.h>
#include <rarefy/nn/boundaries.h>

#include <ostream>
#include <utility>

namespace rarefy::nn {

template <typename Derived>
void BoundaryModule<Derived>::reset() {
  register_own();
  if (!specs_.empty()) {
    quant = this->register_module("quant", QuantState(specs_));
  }
}

template <typename Derived>
void BoundaryModule<Derived>::prepare(const quantization::LayerConfig& config,
                                      const quantization::Observer& default_observer) {
  TORCH_CHECK_VALUE(mode_ == Mode::floating, "[prepare] ", kind(), " must be floating point, but is already prepared");
  if (!config.activation.has_value()) {
    return;
  }
  const quantization::FakeQuantizerOptions options{*config.activation, config.observer.value_or(default_observer), 1};
  if (quantizes_input_) {
    specs_.push_back({"input", options});
  }
  specs_.push_back({"output", options});
  quant = this->register_module("quant", QuantState(specs_));
  quant->train(this->is_training());
  for (const auto& parameter : this->parameters(/*recurse=*/false)) {
    quant->to(parameter.device());
  }
  mode_ = Mode::prepared;
}

template <typename Derived>
void BoundaryModule<Derived>::restore(const ConvertedState& state) {
  TORCH_CHECK_VALUE(mode_ == Mode::floating, "[restore] ", kind(), " must be floating point");
  specs_ = state.quantizers;
  quant = this->register_module("quant", QuantState(specs_));
  quant->train(this->is_training());
  target = state.target;
  const torch::NoGradGuard no_grad;
  for (const auto& [name, tensor] : state.tensors) {
    this->named_parameters(/*recurse=*/false)[name].copy_(tensor);
    quant->to(tensor.device());
  }
  mode_ = Mode::converted;
}

template <typename Derived>
std::vector<std::string> BoundaryModule<Derived>::tensor_names() const {
  std::vector<std::string> names;
  for (const auto& item : this->named_parameters(/*recurse=*/false)) {
    names.push_back(item.key());
  }
  return names;
}

template <typename Derived>
void BoundaryModule<Derived>::pretty_print(std::ostream& stream) const {
  stream << "rarefy::nn::" << kind() << "()";
}

template <typename Derived>
torch::Tensor BoundaryModule<Derived>::forward(const torch::Tensor& x) {
  if (mode_ == Mode::floating) {
    return compute(x);
  }
  return quant->apply("output", compute(quant->apply("input", x)));
}

LayerNormImpl::LayerNormImpl(torch::nn::LayerNormOptions options_) : options(std::move(options_)) { reset(); }

void LayerNormImpl::register_own() {
  if (options.elementwise_affine()) {
    weight = register_parameter("weight", at::ones(options.normalized_shape()));
    bias = register_parameter("bias", at::zeros(options.normalized_shape()));
  }
}

torch::Tensor LayerNormImpl::compute(const torch::Tensor& x) const {
  return at::layer_norm(x, options.normalized_shape(), weight, bias, options.eps());
}

GroupNormImpl::GroupNormImpl(const torch::nn::GroupNormOptions& options_) : options(options_) { reset(); }

void GroupNormImpl::register_own() {
  if (options.affine()) {
    weight = register_parameter("weight", at::ones({options.num_channels()}));
    bias = register_parameter("bias", at::zeros({options.num_channels()}));
  }
}

torch::Tensor GroupNormImpl::compute(const torch::Tensor& x) const {
  return at::group_norm(x, options.num_groups(), weight, bias, options.eps());
}

RMSNormImpl::RMSNormImpl(std::vector<int64_t> normalized_shape, std::optional<double> eps, bool elementwise_affine)
    : normalized_shape_(std::move(normalized_shape)), eps_(eps), affine_(elementwise_affine) {
  reset();
}

void RMSNormImpl::register_own() {
  if (affine_) {
    weight = register_parameter("weight", at::ones(normalized_shape_));
  }
}

torch::Tensor RMSNormImpl::compute(const torch::Tensor& x) const {
  return at::rms_norm(x, normalized_shape_, affine_ ? std::optional(weight) : std::nullopt, eps_);
}

torch::Tensor GELUImpl::compute(const torch::Tensor& x) const { return at::gelu(x, options.approximate()); }

torch::Tensor SiLUImpl::compute(const torch::Tensor& x) const { return at::silu(x); }

torch::Tensor HardswishImpl::compute(const torch::Tensor& x) const { return at::hardswish(x); }

torch::Tensor SoftmaxImpl::compute(const torch::Tensor& x) const { return at::softmax(x, dim_); }

template class BoundaryModule<LayerNormImpl>;
template class BoundaryModule<GroupNormImpl>;
template class BoundaryModule<RMSNormImpl>;
template class BoundaryModule<GELUImpl>;
template class BoundaryModule<SiLUImpl>;
template class BoundaryModule<HardswishImpl>;
template class BoundaryModule<SoftmaxImpl>;

}  // namespace rarefy::nn
