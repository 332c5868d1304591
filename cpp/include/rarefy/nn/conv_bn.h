#pragma once

#include <rarefy/nn/conv.h>
#include <torch/nn/modules/batchnorm.h>

#include <memory>

namespace rarefy::nn {

template <size_t D>
class FoldedBatchNormImpl;

/// Joins a convolution to a batch normalization that stands elsewhere in the model; cloning both joins the clones.
template <size_t D>
struct FoldLink {
  std::weak_ptr<FoldedBatchNormImpl<D>> bn;
  std::shared_ptr<FoldLink> successor;  // of the convolution's clone, waiting for the clone of the batch normalization
};

/// A batch normalization that the convolution before it applies: parameters and statistics, and the identity as forward.
/// Where prepare folds a torch::nn::BatchNorm of a Sequential, this takes its place, so that names stay.
template <size_t D>
class RAREFY_API FoldedBatchNormImpl : public torch::nn::BatchNormImplBase<D, FoldedBatchNormImpl<D>> {
 public:
  using Base = torch::nn::BatchNormImplBase<D, FoldedBatchNormImpl<D>>;
  explicit FoldedBatchNormImpl(const torch::nn::BatchNormOptions& options) : Base(options) {}

  std::shared_ptr<torch::nn::Module> clone(const std::optional<torch::Device>& device = std::nullopt) const override;
  torch::Tensor forward(const torch::Tensor& x) { return x; }
  /// Batch normalization proper: with the batch's statistics when it moves, the running ones otherwise.
  torch::Tensor normalize(const torch::Tensor& x);
  /// Whether the batch's statistics are used, and the running ones follow them.
  bool moves() const { return this->is_training() && !frozen; }
  /// Takes over the parameters (the tensors themselves) and the statistics of another one.
  template <typename Other>
  void adopt(const Other& other);
  /// Normalize with the running statistics and leave them alone, in training too.
  bool frozen = false;
  /// Set where the convolution is elsewhere.
  std::shared_ptr<FoldLink<D>> link;
  /// Part of an integer weight by now: convert() takes it out of the model.
  bool spent = false;

 protected:
  void _check_input_dim(const torch::Tensor& input) override;
};

using FoldedBatchNorm1dImpl = FoldedBatchNormImpl<1>;
using FoldedBatchNorm2dImpl = FoldedBatchNormImpl<2>;
using FoldedBatchNorm3dImpl = FoldedBatchNormImpl<3>;
/// Stands where a batch normalization was that is part of the integers of a convolution by now: the identity.
class RAREFY_API SpentBatchNormImpl : public torch::nn::Cloneable<SpentBatchNormImpl> {
 public:
  void reset() override {}
  void pretty_print(std::ostream& stream) const override;
  torch::Tensor forward(const torch::Tensor& x) { return x; }
};
TORCH_MODULE(SpentBatchNorm);

TORCH_MODULE(FoldedBatchNorm1d);
TORCH_MODULE(FoldedBatchNorm2d);
TORCH_MODULE(FoldedBatchNorm3d);

/// A convolution and the batch normalization after it, as one layer. Parameters: weight (and bias), and those of the child
/// `bn`. Prepared, the convolution runs with the weight that will be deployed, w * gamma / sqrt(running_var + eps) on the
/// grid; in training its result is divided by that factor again and normalized with the batch's statistics (Krishnamoorthi,
/// 2018, arXiv:1806.08342, section 3.2.2), in evaluation the folded weight and bias give the result directly. In training
/// gamma learns through the normalization alone: the convolution's result depends on the factor only by rounding.
template <size_t D>
class RAREFY_API ConvBnImpl : public ConvModule<D, ConvBnImpl<D>> {
 public:
  ConvBnImpl(int64_t in_channels, int64_t out_channels, torch::ExpandingArray<D> kernel_size)
      : ConvBnImpl(ConvOptions<D>(in_channels, out_channels, kernel_size).bias(false)) {}
  explicit ConvBnImpl(ConvOptions<D> options, double eps = 1e-5, double momentum = 0.1);
  /// Over parameters that exist, applying a batch normalization that stays a module elsewhere.
  ConvBnImpl(ConvOptions<D> options, const torch::Tensor& given_weight, const torch::Tensor& given_bias,
             const std::shared_ptr<FoldedBatchNormImpl<D>>& linked);

  std::shared_ptr<torch::nn::Module> clone(const std::optional<torch::Device>& device = std::nullopt) const override;
  torch::Tensor forward(const torch::Tensor& x) { return this->run(x); }

  /// The layer's own batch normalization; empty once converted, and where it stands elsewhere in the model.
  torch::nn::ModuleHolder<FoldedBatchNormImpl<D>> bn{nullptr};

 protected:
  void register_floating() override;
  torch::Tensor run_floating(const torch::Tensor& x) override;
  torch::Tensor run_prepared(const torch::Tensor& x) override;
  std::pair<torch::Tensor, torch::Tensor> folded() override;
  std::vector<torch::Tensor> sources() const override;
  void after_convert() override;

 private:
  std::shared_ptr<FoldedBatchNormImpl<D>> applied() const;
  torch::Tensor fold_factor(const FoldedBatchNormImpl<D>& norm) const;

  double eps_;
  double momentum_;
  std::shared_ptr<FoldLink<D>> link_;
};

extern template class FoldedBatchNormImpl<1>;
extern template class FoldedBatchNormImpl<2>;
extern template class FoldedBatchNormImpl<3>;
extern template class ConvBnImpl<1>;
extern template class ConvBnImpl<2>;
extern template class ConvBnImpl<3>;
using ConvBn1dImpl = ConvBnImpl<1>;
using ConvBn2dImpl = ConvBnImpl<2>;
using ConvBn3dImpl = ConvBnImpl<3>;
TORCH_MODULE(ConvBn1d);
TORCH_MODULE(ConvBn2d);
TORCH_MODULE(ConvBn3d);

template <size_t D>
template <typename Other>
void FoldedBatchNormImpl<D>::adopt(const Other& other) {
  this->weight = this->parameters_["weight"] = other.weight;
  this->bias = this->parameters_["bias"] = other.bias;
  this->running_mean.set_data(other.running_mean);
  this->running_var.set_data(other.running_var);
  this->num_batches_tracked.set_data(other.num_batches_tracked);
  this->train(other.is_training());
}

}  // namespace rarefy::nn
