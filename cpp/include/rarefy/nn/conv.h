#pragma once

#include <rarefy/nn/weighted.h>
#include <torch/nn/modules/batchnorm.h>
#include <torch/nn/options/conv.h>

namespace rarefy::nn {

using Conv2dOptions = torch::nn::Conv2dOptions;

/// Takes the place of torch::nn::Conv2d: x [N, in, H, W] to [N, out, h, w]; zero padding given in numbers. Floating point
/// until rarefy::quantization::prepare_qat or prepare; int8 after convert. Same parameter names and initialization.
class RAREFY_API Conv2dImpl : public WeightedModule<Conv2dImpl> {
 public:
  Conv2dImpl(int64_t in_channels, int64_t out_channels, torch::ExpandingArray<2> kernel_size)
      : Conv2dImpl(Conv2dOptions(in_channels, out_channels, kernel_size)) {}
  /// Throws c10::ValueError for a padding mode other than zeros, padding by name, or channels that groups do not divide.
  explicit Conv2dImpl(Conv2dOptions options);

  void reset_parameters();
  void pretty_print(std::ostream& stream) const override;
  std::string kind() const override { return "Conv2d"; }
  torch::Tensor forward(const torch::Tensor& x);

  Conv2dOptions options;

 protected:
  void register_floating() override;
  torch::Tensor pack(const torch::Tensor& x) override;
};
TORCH_MODULE(Conv2d);

/// A convolution and the batch normalization after it, as one layer. Parameters: weight (and bias), and those of the child
/// `bn`. Prepared, the convolution runs with the weight that will be deployed, w * gamma / sqrt(running_var + eps) on the
/// grid; in training its result is divided by that factor again and normalized with the batch's statistics (Krishnamoorthi,
/// 2018, arXiv:1806.08342, section 3.2.2), in evaluation the folded weight and bias give the result directly.
class RAREFY_API ConvBn2dImpl : public WeightedModule<ConvBn2dImpl> {
 public:
  ConvBn2dImpl(int64_t in_channels, int64_t out_channels, torch::ExpandingArray<2> kernel_size)
      : ConvBn2dImpl(Conv2dOptions(in_channels, out_channels, kernel_size).bias(false)) {}
  explicit ConvBn2dImpl(Conv2dOptions options, double eps = 1e-5, double momentum = 0.1);

  void reset_parameters();
  void pretty_print(std::ostream& stream) const override;
  std::string kind() const override { return "ConvBn2d"; }
  torch::Tensor forward(const torch::Tensor& x);

  Conv2dOptions options;
  /// Empty once converted.
  torch::nn::BatchNorm2d bn{nullptr};

 protected:
  void register_floating() override;
  std::pair<torch::Tensor, torch::Tensor> folded() override;
  torch::Tensor pack(const torch::Tensor& x) override;
  void after_convert() override;

 private:
  torch::Tensor fold_factor() const;

  double eps_;
  double momentum_;
};
TORCH_MODULE(ConvBn2d);

}  // namespace rarefy::nn
