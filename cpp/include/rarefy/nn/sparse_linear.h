#pragma once

#include <rarefy/export.h>
#include <rarefy/ops/sparse_linear.h>
#include <torch/nn/cloneable.h>

namespace rarefy::nn {

/// A linear layer whose weight is mostly zero, x [..., in] to [..., out], on the kernels of rarefy/ops/sparse_linear.h. For
/// inference. Made by rarefy::pruning::sparsify from torch::nn::Linear and rarefy::nn::Linear.
///
/// Buffers weight_values, weight_columns and weight_row_offsets (see ops::SparseWeight), and a bias that stays the parameter
/// that it was.
class RAREFY_API SparseLinearImpl : public torch::nn::Cloneable<SparseLinearImpl> {
 public:
  /// `given_bias` is [out], or undefined.
  SparseLinearImpl(const ops::SparseWeight& weight, int64_t in_features, const torch::Tensor& given_bias);

  void reset() override;
  void pretty_print(std::ostream& stream) const override;
  torch::Tensor forward(const torch::Tensor& x);

  int64_t in_features() const { return in_features_; }
  int64_t out_features() const { return out_features_; }
  ops::SparseWeight sparse_weight() const { return {weight_values, weight_columns, weight_row_offsets}; }
  /// The dense weight [out, in].
  torch::Tensor dense_weight() const { return ops::to_dense_weight(sparse_weight(), in_features_); }

  torch::Tensor weight_values, weight_columns, weight_row_offsets;
  torch::Tensor bias;

 private:
  int64_t in_features_, out_features_;
};
TORCH_MODULE(SparseLinear);

}  // namespace rarefy::nn
