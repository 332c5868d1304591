#pragma once

#include <rarefy/nn/quantizable.h>
#include <torch/nn/options/activation.h>
#include <torch/nn/options/normalization.h>

#include <optional>
#include <string>
#include <vector>

namespace rarefy::nn {

/// A normalization or an activation function in floating point between quantizers: its result is quantized (`quant.output`), and
/// its input too (`quant.input`) for a target that computes it on integers (quantization::TargetProfile::boundary_inputs, which
/// prepare asks through set_quantizes_input). Weights of normalizations stay in floating point. After convert it is the same.
class RAREFY_API Boundary : public Quantizable {
 public:
  void set_quantizes_input(bool quantizes) { quantizes_input_ = quantizes; }

 protected:
  bool quantizes_input_ = false;
  QuantStateImpl::Specs specs_;
};

template <typename Derived>
class RAREFY_API BoundaryModule : public torch::nn::Cloneable<Derived>, public Boundary {
 public:
  void reset() override;
  void prepare(const quantization::LayerConfig& config, const quantization::Observer& default_observer) override;
  void convert() override { mode_ = Mode::converted; }
  void restore(const ConvertedState& state) override;
  std::vector<std::string> tensor_names() const override;
  void pretty_print(std::ostream& stream) const override;
  torch::Tensor forward(const torch::Tensor& x);

 protected:
  /// Registers weight and bias; nothing for a function.
  virtual void register_own() {}
  virtual torch::Tensor compute(const torch::Tensor& x) const = 0;
};

/// torch::nn::LayerNorm: see Boundary.
class RAREFY_API LayerNormImpl : public BoundaryModule<LayerNormImpl> {
 public:
  explicit LayerNormImpl(torch::nn::LayerNormOptions options);
  std::string kind() const override { return "LayerNorm"; }
  torch::nn::LayerNormOptions options;
  torch::Tensor weight, bias;

 protected:
  void register_own() override;
  torch::Tensor compute(const torch::Tensor& x) const override;
};
TORCH_MODULE(LayerNorm);

/// torch::nn::GroupNorm: see Boundary.
class RAREFY_API GroupNormImpl : public BoundaryModule<GroupNormImpl> {
 public:
  GroupNormImpl(int64_t num_groups, int64_t num_channels)
      : GroupNormImpl(torch::nn::GroupNormOptions(num_groups, num_channels)) {}
  explicit GroupNormImpl(const torch::nn::GroupNormOptions& options);
  std::string kind() const override { return "GroupNorm"; }
  torch::nn::GroupNormOptions options;
  torch::Tensor weight, bias;

 protected:
  void register_own() override;
  torch::Tensor compute(const torch::Tensor& x) const override;
};
TORCH_MODULE(GroupNorm);

/// x / sqrt(mean(x^2) + eps) * weight over the last dimensions, as Python's nn.RMSNorm (Zhang and Sennrich, 2019,
/// arXiv:1910.07467): see Boundary. eps unset: that of the type of x.
class RAREFY_API RMSNormImpl : public BoundaryModule<RMSNormImpl> {
 public:
  explicit RMSNormImpl(std::vector<int64_t> normalized_shape, std::optional<double> eps = std::nullopt,
                       bool elementwise_affine = true);
  std::string kind() const override { return "RMSNorm"; }
  torch::Tensor weight;

 protected:
  void register_own() override;
  torch::Tensor compute(const torch::Tensor& x) const override;

 private:
  std::vector<int64_t> normalized_shape_;
  std::optional<double> eps_;
  bool affine_;
};
TORCH_MODULE(RMSNorm);

/// torch::nn::GELU: see Boundary.
class RAREFY_API GELUImpl : public BoundaryModule<GELUImpl> {
 public:
  explicit GELUImpl(torch::nn::GELUOptions options = {}) : options(std::move(options)) {}
  std::string kind() const override { return "GELU"; }
  torch::nn::GELUOptions options;

 protected:
  torch::Tensor compute(const torch::Tensor& x) const override;
};
TORCH_MODULE(GELU);

/// torch::nn::SiLU: see Boundary.
class RAREFY_API SiLUImpl : public BoundaryModule<SiLUImpl> {
 public:
  std::string kind() const override { return "SiLU"; }

 protected:
  torch::Tensor compute(const torch::Tensor& x) const override;
};
TORCH_MODULE(SiLU);

/// x * min(max(x + 3, 0), 6) / 6: see Boundary.
class RAREFY_API HardswishImpl : public BoundaryModule<HardswishImpl> {
 public:
  std::string kind() const override { return "Hardswish"; }

 protected:
  torch::Tensor compute(const torch::Tensor& x) const override;
};
TORCH_MODULE(Hardswish);

/// torch::nn::Softmax along `dim`: see Boundary.
class RAREFY_API SoftmaxImpl : public BoundaryModule<SoftmaxImpl> {
 public:
  explicit SoftmaxImpl(int64_t dim) : dim_(dim) {}
  std::string kind() const override { return "Softmax"; }

 protected:
  torch::Tensor compute(const torch::Tensor& x) const override;

 private:
  int64_t dim_;
};
TORCH_MODULE(Softmax);

}  // namespace rarefy::nn
