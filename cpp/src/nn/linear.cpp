#include <ATen/ops/linear.h>
#include <rarefy/nn/linear.h>
#include <rarefy/ops/quantized.h>
#include <torch/nn/init.h>

#include <cmath>
#include <ostream>

#include "nn/module_buffers.h"

namespace rarefy::nn {

LinearImpl::LinearImpl(const LinearOptions& options_) : options(options_) {
  reset();
  reset_parameters();
}

LinearImpl::LinearImpl(const LinearOptions& options_, const torch::Tensor& given_weight,
                       const torch::Tensor& given_bias)
    : options(options_) {
  reset();
  adopt(given_weight, given_bias);
}

void LinearImpl::register_floating() {
  if (is_sparse()) {
    sparse_ = ops::SparseWeight{register_buffer("weight_values", sparse_->values),
                                register_buffer("weight_columns", sparse_->columns),
                                register_buffer("weight_row_offsets", sparse_->row_offsets)};
    bias = options.bias() ? register_parameter("bias", torch::empty({options.out_features()})) : torch::Tensor();
    return;
  }
  weight = register_parameter("weight", torch::empty({options.out_features(), options.in_features()}));
  bias = options.bias() ? register_parameter("bias", torch::empty({options.out_features()})) : torch::Tensor();
}

void LinearImpl::reset_parameters() {
  torch::nn::init::kaiming_uniform_(weight, std::sqrt(5.0));
  if (bias.defined()) {
    const double bound = 1.0 / std::sqrt(static_cast<double>(options.in_features()));
    torch::nn::init::uniform_(bias, -bound, bound);
  }
}

void LinearImpl::pretty_print(std::ostream& stream) const {
  stream << "rarefy::nn::Linear(in_features=" << options.in_features() << ", out_features=" << options.out_features()
         << ", bias=" << std::boolalpha << options.bias() << ")";
}

torch::Tensor LinearImpl::compute(const torch::Tensor& x, const torch::Tensor& w, const torch::Tensor& b) {
  return at::linear(x, w, b);
}

torch::Tensor LinearImpl::compute_integer(const torch::Tensor& x, const torch::Tensor& w, const torch::Tensor&,
                                          const torch::Tensor& b, const ops::IntegerGrids& grids,
                                          const ops::IntegerOptions& options_) {
  return ops::integer_linear(x, w, b.defined() ? std::optional(b) : std::nullopt, grids, /*transposed=*/false,
                             options_);
}

torch::Tensor LinearImpl::execute(const torch::Tensor& x) {
  return ops::quantized_linear(x, weight, weight_scale(), optional_bias(), quant->grid("input"), relu(),
                               quant->output_grid());
}

void LinearImpl::prepare(const quantization::LayerConfig& config, const quantization::Observer& default_observer) {
  TORCH_CHECK_VALUE(!is_sparse(), "[prepare] Linear must be dense, but is sparse: to_dense() the model first");
  WeightedModule<LinearImpl>::prepare(config, default_observer);
}

void LinearImpl::become_sparse(const ops::SparseWeight& given) {
  TORCH_CHECK_VALUE(mode_ == Mode::floating && !is_sparse(), "[become_sparse] Linear must be dense floating point");
  const int64_t height = given.values.dim() == 3 ? given.values.size(1) : 1;
  TORCH_CHECK_VALUE((given.row_offsets.numel() - 1) * height == options.out_features(),
                    "[become_sparse] the weight must have ", options.out_features(), " rows, got ",
                    (given.row_offsets.numel() - 1) * height);
  parameters_.erase("weight");
  weight = torch::Tensor();
  sparse_ = ops::SparseWeight{register_buffer("weight_values", given.values),
                              register_buffer("weight_columns", given.columns),
                              register_buffer("weight_row_offsets", given.row_offsets)};
}

void LinearImpl::become_dense(const torch::Tensor& given) {
  TORCH_CHECK_VALUE(is_sparse(), "[become_dense] Linear must be sparse");
  const auto dense = given.defined() ? given : ops::to_dense_weight(*sparse_, options.in_features());
  for (const auto* name : {"weight_values", "weight_columns", "weight_row_offsets"}) {
    unregister_buffer(*this, name);
  }
  sparse_.reset();
  weight = register_parameter("weight", dense, !given.defined() || given.requires_grad());
  if (bias.defined()) {  // behind the weight again
    parameters_.erase("bias");
    parameters_.insert("bias", bias);
  }
}

torch::Tensor LinearImpl::run_sparse(const torch::Tensor& x) const {
  const auto y = ops::sparse_linear(x, *sparse_, optional_bias());
  return relu() ? ops::relu(y) : y;
}

}  // namespace rarefy::nn
