#include <ATen/ops/batch_norm.h>
#include <rarefy/nn/conv_bn.h>
#include <rarefy/ops/inverse_std.h>

#include "nn/conv_module.h"

namespace rarefy::nn {

void SpentBatchNormImpl::pretty_print(std::ostream& stream) const { stream << "rarefy::nn::SpentBatchNorm()"; }

template <size_t D>
void FoldedBatchNormImpl<D>::_check_input_dim(const torch::Tensor& input) {
  const int64_t dims = static_cast<int64_t>(D) + 2;
  TORCH_CHECK_VALUE(input.dim() == dims || (D == 1 && input.dim() == 2), "[FoldedBatchNorm", D, "d] input must have ",
                    dims, " dimensions, got shape ", input.sizes());
}

template <size_t D>
torch::Tensor FoldedBatchNormImpl<D>::normalize(const torch::Tensor& x) {
  if (this->is_training() && frozen) {
    return at::batch_norm(x, this->weight, this->bias, this->running_mean, this->running_var, /*training=*/false,
                          /*momentum=*/0.0, this->options.eps(), /*cudnn_enabled=*/true);
  }
  return Base::forward(x);
}

template <size_t D>
std::shared_ptr<torch::nn::Module> FoldedBatchNormImpl<D>::clone(const std::optional<torch::Device>& device) const {
  auto module = torch::nn::Cloneable<FoldedBatchNormImpl<D>>::clone(device);
  auto copy = std::dynamic_pointer_cast<FoldedBatchNormImpl<D>>(module);
  if (link != nullptr) {
    // The convolution stands before its batch normalization, and was cloned before.
    copy->link = std::exchange(link->successor, nullptr);
    if (copy->link != nullptr) {
      copy->link->bn = copy;
    }
  }
  return module;
}

template <size_t D>
ConvBnImpl<D>::ConvBnImpl(ConvOptions<D> options_, double eps, double momentum)
    : ConvModule<D, ConvBnImpl<D>>("ConvBn", std::move(options_)), eps_(eps), momentum_(momentum) {
  this->reset();
  this->reset_parameters();
}

template <size_t D>
ConvBnImpl<D>::ConvBnImpl(ConvOptions<D> options_, const torch::Tensor& given_weight, const torch::Tensor& given_bias,
                          const std::shared_ptr<FoldedBatchNormImpl<D>>& linked)
    : ConvModule<D, ConvBnImpl<D>>("ConvBn", std::move(options_)),
      eps_(linked->options.eps()),
      momentum_(linked->options.momentum().value_or(0.1)),
      link_(std::make_shared<FoldLink<D>>()) {
  link_->bn = linked;
  linked->link = link_;
  this->reset();
  this->adopt(given_weight, given_bias);
}

template <size_t D>
std::shared_ptr<torch::nn::Module> ConvBnImpl<D>::clone(const std::optional<torch::Device>& device) const {
  auto module = torch::nn::Cloneable<ConvBnImpl<D>>::clone(device);
  if (link_ != nullptr) {
    link_->successor = std::make_shared<FoldLink<D>>();
    std::dynamic_pointer_cast<ConvBnImpl<D>>(module)->link_ = link_->successor;
  }
  return module;
}

template <size_t D>
void ConvBnImpl<D>::register_floating() {
  ConvModule<D, ConvBnImpl<D>>::register_floating();
  if (link_ == nullptr) {
    const auto batch_norm_options =
        torch::nn::BatchNormOptions(this->options.out_channels()).eps(eps_).momentum(momentum_);
    bn = this->register_module("bn", std::make_shared<FoldedBatchNormImpl<D>>(batch_norm_options));
  }
}

template <size_t D>
std::shared_ptr<FoldedBatchNormImpl<D>> ConvBnImpl<D>::applied() const {
  if (link_ == nullptr) {
    return bn.ptr();
  }
  auto norm = link_->bn.lock();
  TORCH_CHECK_VALUE(norm != nullptr, "[", this->kind(),
                    "] the batch normalization that is folded in must exist: clone the model that holds both");
  return norm;
}

template <size_t D>
torch::Tensor ConvBnImpl<D>::fold_factor(const FoldedBatchNormImpl<D>& norm) const {
  const auto factor = norm.weight * ops::inverse_std(norm.running_var, norm.options.eps());
  // A channel whose gamma is 0 would divide by 0 below: keep its factor away from 0, where it still folds to almost nothing.
  constexpr double smallest = 1e-12;
  return torch::where(factor.abs() < smallest, torch::full_like(factor, smallest), factor);
}

namespace {

torch::Tensor per_filter(const torch::Tensor& values, int64_t dim) {
  std::vector<int64_t> shape(static_cast<size_t>(dim), 1);
  shape[0] = -1;
  return values.view(shape);
}

torch::Tensor per_channel(const torch::Tensor& values, int64_t dim) {
  std::vector<int64_t> shape(static_cast<size_t>(dim), 1);
  shape[1] = -1;
  return values.view(shape);
}

}  // namespace

template <size_t D>
std::pair<torch::Tensor, torch::Tensor> ConvBnImpl<D>::folded() {
  const auto norm = applied();
  const auto factor = fold_factor(*norm);
  const auto centered = this->bias.defined() ? this->bias - norm->running_mean : -norm->running_mean;
  return {this->weight * per_filter(factor, this->weight.dim()), norm->bias + centered * factor};
}

template <size_t D>
std::vector<torch::Tensor> ConvBnImpl<D>::sources() const {
  const auto norm = applied();
  return {this->weight, this->bias, norm->weight, norm->bias, norm->running_mean, norm->running_var};
}

template <size_t D>
void ConvBnImpl<D>::after_convert() {
  if (link_ == nullptr) {
    this->unregister_module("bn");
    bn = nullptr;
  } else {
    applied()->spent = true;
    link_ = nullptr;
  }
}

template <size_t D>
torch::Tensor ConvBnImpl<D>::run_floating(const torch::Tensor& x) {
  return applied()->normalize(this->compute(x, this->weight, this->bias));
}

template <size_t D>
torch::Tensor ConvBnImpl<D>::run_prepared(const torch::Tensor& x) {
  const auto norm = applied();
  if (this->trains_in_integers(x)) {
    const auto options = this->integer_options();
    if (!norm->moves()) {
      const auto [w, b] = folded();
      return this->compute_integer(x, w, {}, b, this->grids_for(x, w), options);
    }
    const auto factor = fold_factor(*norm).detach();
    const auto grids = this->grids_for(x, this->weight, factor);
    return norm->normalize(this->compute_integer(x, this->weight, factor, this->bias, grids, options));
  }
  const auto input = this->quant->apply("input", x);
  if (!norm->moves()) {
    const auto [rounded_weight, folded_bias] = this->rounded();
    return this->compute(input, rounded_weight, folded_bias);
  }
  const auto dim = this->weight.dim();
  const auto factor = fold_factor(*norm).detach();
  const auto scaled = this->quant->apply("weight", this->weight * per_filter(factor, dim));
  auto out = this->compute(input, scaled, torch::Tensor()) / per_channel(factor, dim);
  if (this->bias.defined()) {
    out = out + per_channel(this->bias, dim);
  }
  return norm->normalize(out);
}

template class FoldedBatchNormImpl<1>;
template class FoldedBatchNormImpl<2>;
template class FoldedBatchNormImpl<3>;
template class ConvBnImpl<1>;
template class ConvBnImpl<2>;
template class ConvBnImpl<3>;

}  // namespace rarefy::nn
