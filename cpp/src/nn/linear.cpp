#include <ATen/ops/linear.h>
#include <rarefy/nn/linear.h>
#include <rarefy/ops/quantized_linear.h>
#include <torch/nn/init.h>

#include <cmath>
#include <ostream>

namespace rarefy::nn {

LinearImpl::LinearImpl(const LinearOptions& options_) : options(options_) {
  reset();
  reset_parameters();
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

torch::Tensor LinearImpl::pack(const torch::Tensor&) { return ops::pack_linear_weight(weight); }

torch::Tensor LinearImpl::forward(const torch::Tensor& x) {
  if (mode_ == Mode::floating) {
    return at::linear(x, weight, bias);
  }
  if (mode_ == Mode::converted) {
    if (!executes_integers()) {
      return at::linear(x, dequantized_weight(), bias);
    }
    const auto* input = quant->find("input");
    const auto& packed_weight = packed(x);
    return ops::quantized_linear(x, packed_weight, weight_scale_, bias.defined() ? std::optional(bias) : std::nullopt,
                                 input->scale, input->zero_point, input->options.scheme.qmin(),
                                 input->options.scheme.qmax(), false);
  }
  return at::linear(quant->apply("input", x), quant->apply("weight", weight), bias);
}

}  // namespace rarefy::nn
