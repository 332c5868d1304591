#pragma once

#include <rarefy/nn/weighted.h>
#include <torch/nn/options/linear.h>

namespace rarefy::nn {

using LinearOptions = torch::nn::LinearOptions;

/// Takes the place of torch::nn::Linear: x [..., in] to [..., out]. Floating point until
/// rarefy::quantization::prepare_qat or prepare; int8 after convert. Same parameter names and initialization.
class RAREFY_API LinearImpl : public WeightedModule<LinearImpl> {
 public:
  LinearImpl(int64_t in_features, int64_t out_features) : LinearImpl(LinearOptions(in_features, out_features)) {}
  explicit LinearImpl(const LinearOptions& options);
  /// Over parameters that exist: weight [out, in], bias [out] or undefined.
  LinearImpl(const LinearOptions& options, const torch::Tensor& given_weight, const torch::Tensor& given_bias);

  void reset_parameters();
  void pretty_print(std::ostream& stream) const override;
  std::string kind() const override { return "Linear"; }
  torch::Tensor forward(const torch::Tensor& x) { return run(x); }

  LinearOptions options;

 protected:
  void register_floating() override;
  torch::Tensor compute(const torch::Tensor& x, const torch::Tensor& w, const torch::Tensor& b) override;
  torch::Tensor compute_integer(const torch::Tensor& x, const torch::Tensor& w, const torch::Tensor& factor,
                                const torch::Tensor& b, const ops::IntegerGrids& grids,
                                const ops::IntegerOptions& options) override;
  bool has_integer_kernel_on(c10::DeviceType device) const override {
    return device == c10::DeviceType::CPU || device == c10::DeviceType::CUDA;
  }
  torch::Tensor execute(const torch::Tensor& x) override;
};
TORCH_MODULE(Linear);

}  // namespace rarefy::nn
