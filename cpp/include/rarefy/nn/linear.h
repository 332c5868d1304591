#pragma once

#include <rarefy/nn/weighted.h>
#include <rarefy/ops/sparse_linear.h>
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
  std::optional<int64_t> input_axis(int64_t dims) const override { return dims - 1; }
  torch::Tensor by_input(const torch::Tensor& values) const override { return values.view({1, -1}); }
  torch::Tensor forward(const torch::Tensor& x) { return is_sparse() ? run_sparse(x) : run(x); }

  void prepare(const quantization::LayerConfig& config, const quantization::Observer& default_observer) override;

  /// Computes with a sparse weight from now on, for inference: `weight` is gone, and the buffers of rarefy::nn::SparseLinear
  /// take its place. See rarefy::pruning::sparsify. Throws c10::ValueError for a layer that is quantized or sparse, and for a
  /// weight of another shape.
  void become_sparse(const ops::SparseWeight& given);
  /// Dense again, with `given` as the weight; unset: with a new parameter of the same values.
  void become_dense(const torch::Tensor& given = {});
  bool is_sparse() const { return sparse_.has_value(); }

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
  torch::Tensor compute_packed(const torch::Tensor& x, const quantization::QuantizedTensorParts& w,
                               const torch::Tensor& b) override {
    return quantization::packed_linear(x, w, b.defined() ? std::optional(b) : std::nullopt);
  }

 private:
  torch::Tensor run_sparse(const torch::Tensor& x) const;

  std::optional<ops::SparseWeight> sparse_;
};
TORCH_MODULE(Linear);

}  // namespace rarefy::nn
