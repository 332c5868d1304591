#include <ATen/ops/linear.h>
#include <rarefy/nn/linear.h>
#include <rarefy/ops/quantized.h>
#include <torch/nn/init.h>

#include <cmath>
#include <ostream>

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

}  // namespace rarefy::nn
