#include <rarefy/nn/sparse_linear.h>

#include <ostream>

namespace rarefy::nn {

SparseLinearImpl::SparseLinearImpl(const ops::SparseWeight& weight, int64_t in_features,
                                   const torch::Tensor& given_bias)
    : weight_values(weight.values),
      weight_columns(weight.columns),
      weight_row_offsets(weight.row_offsets),
      bias(given_bias),
      in_features_(in_features),
      out_features_((weight.row_offsets.numel() - 1) * (weight.values.dim() == 3 ? weight.values.size(1) : 1)) {
  SparseLinearImpl::reset();
}

void SparseLinearImpl::reset() {
  weight_values = register_buffer("weight_values", weight_values);
  weight_columns = register_buffer("weight_columns", weight_columns);
  weight_row_offsets = register_buffer("weight_row_offsets", weight_row_offsets);
  if (bias.defined()) {
    bias = register_parameter("bias", bias, bias.requires_grad());  // the tensor itself
  }
}

void SparseLinearImpl::pretty_print(std::ostream& stream) const {
  const auto rows = weight_values.dim() == 3 ? weight_values.size(1) : 1;
  const auto columns = weight_values.dim() == 3 ? weight_values.size(2) : 1;
  stream << "rarefy::nn::SparseLinear(in_features=" << in_features_ << ", out_features=" << out_features_
         << ", kept=" << weight_values.numel() << ", block=" << rows << "x" << columns << ")";
}

torch::Tensor SparseLinearImpl::forward(const torch::Tensor& x) {
  TORCH_CHECK_VALUE(x.dim() >= 1 && x.size(-1) == in_features_, "[SparseLinear] input must have ", in_features_,
                    " features, got ", x.sizes());
  return ops::sparse_linear(x, sparse_weight(), bias.defined() ? std::optional(bias) : std::nullopt);
}

}  // namespace rarefy::nn
