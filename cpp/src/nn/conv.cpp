#include <ATen/ops/conv2d.h>
#include <rarefy/nn/conv.h>
#include <rarefy/ops/inverse_std.h>
#include <rarefy/ops/quantized_linear.h>
#include <torch/nn/init.h>

#include <cmath>
#include <ostream>

namespace rarefy::nn {
namespace {

void check_options(const char* function, const Conv2dOptions& options) {
  TORCH_CHECK_VALUE(std::holds_alternative<torch::enumtype::kZeros>(options.padding_mode()), "[", function,
                    "] padding_mode must be zeros");
  TORCH_CHECK_VALUE(std::holds_alternative<torch::ExpandingArray<2>>(options.padding()), "[", function,
                    "] padding must be given in numbers");
  TORCH_CHECK_VALUE(options.groups() > 0 && options.in_channels() % options.groups() == 0 &&
                        options.out_channels() % options.groups() == 0,
                    "[", function, "] groups must divide the channels, got ", options.groups(), " groups for ",
                    options.in_channels(), " and ", options.out_channels(), " channels");
}

at::IntArrayRef padding_of(const Conv2dOptions& options) {
  return std::get<torch::ExpandingArray<2>>(options.padding());
}

torch::Tensor empty_weight(const Conv2dOptions& options) {
  return torch::empty({options.out_channels(), options.in_channels() / options.groups(), options.kernel_size()->at(0),
                       options.kernel_size()->at(1)});
}

void initialize(torch::Tensor& weight, torch::Tensor& bias) {
  torch::nn::init::kaiming_uniform_(weight, std::sqrt(5.0));
  if (bias.defined()) {
    const auto fan_in = static_cast<double>(weight[0].numel());
    const double bound = 1.0 / std::sqrt(fan_in);
    torch::nn::init::uniform_(bias, -bound, bound);
  }
}

torch::Tensor convolve(const Conv2dOptions& options, const torch::Tensor& x, const torch::Tensor& weight,
                       const torch::Tensor& bias) {
  return at::conv2d(x, weight, bias, *options.stride(), padding_of(options), *options.dilation(), options.groups());
}

torch::Tensor pack_weight(const Conv2dOptions& options, const torch::Tensor& weight, const torch::Tensor& scale,
                          const quantization::FakeQuantizerImpl& input, const torch::Tensor& x) {
  const int64_t as_uint8 = input.options.scheme.signed_range() ? 128 : 0;
  return ops::pack_conv2d_weight(weight, scale, *options.stride(), padding_of(options), *options.dilation(),
                                 options.groups(), x.sizes(), input.zero_point.item<int64_t>() + as_uint8);
}

torch::Tensor convolve_integers(const Conv2dOptions& options, const torch::Tensor& x, const torch::Tensor& packed,
                                const torch::Tensor& scale, const torch::Tensor& bias,
                                const quantization::FakeQuantizerImpl& input) {
  return ops::quantized_conv2d(x, packed, scale, bias.defined() ? std::optional(bias) : std::nullopt, input.scale,
                               input.zero_point, input.options.scheme.qmin(), input.options.scheme.qmax(),
                               *options.stride(), padding_of(options), *options.dilation(), options.groups(), false);
}

void print(std::ostream& stream, const char* name, const Conv2dOptions& options) {
  stream << "rarefy::nn::" << name << "(" << options.in_channels() << ", " << options.out_channels()
         << ", kernel_size=" << options.kernel_size() << ", stride=" << options.stride() << ")";
}

}  // namespace

Conv2dImpl::Conv2dImpl(Conv2dOptions options_) : options(std::move(options_)) {
  check_options("Conv2d", options);
  reset();
  reset_parameters();
}

void Conv2dImpl::register_floating() {
  weight = register_parameter("weight", empty_weight(options));
  bias = options.bias() ? register_parameter("bias", torch::empty({options.out_channels()})) : torch::Tensor();
}

void Conv2dImpl::reset_parameters() { initialize(weight, bias); }

void Conv2dImpl::pretty_print(std::ostream& stream) const { print(stream, "Conv2d", options); }

torch::Tensor Conv2dImpl::pack(const torch::Tensor& x) {
  return pack_weight(options, weight, weight_scale_, *quant->find("input"), x);
}

torch::Tensor Conv2dImpl::forward(const torch::Tensor& x) {
  if (mode_ == Mode::floating) {
    return convolve(options, x, weight, bias);
  }
  if (mode_ == Mode::converted) {
    if (!executes_integers()) {
      return convolve(options, x, dequantized_weight(), bias);
    }
    const auto& packed_weight = packed(x);
    return convolve_integers(options, x, packed_weight, weight_scale_, bias, *quant->find("input"));
  }
  return convolve(options, quant->apply("input", x), quant->apply("weight", weight), bias);
}

ConvBn2dImpl::ConvBn2dImpl(Conv2dOptions options_, double eps, double momentum)
    : options(std::move(options_)), eps_(eps), momentum_(momentum) {
  check_options("ConvBn2d", options);
  reset();
  reset_parameters();
}

void ConvBn2dImpl::register_floating() {
  weight = register_parameter("weight", empty_weight(options));
  bias = options.bias() ? register_parameter("bias", torch::empty({options.out_channels()})) : torch::Tensor();
  bn = register_module(
      "bn", torch::nn::BatchNorm2d(torch::nn::BatchNormOptions(options.out_channels()).eps(eps_).momentum(momentum_)));
}

void ConvBn2dImpl::reset_parameters() { initialize(weight, bias); }

void ConvBn2dImpl::pretty_print(std::ostream& stream) const { print(stream, "ConvBn2d", options); }

torch::Tensor ConvBn2dImpl::fold_factor() const {
  const auto factor = bn->weight * ops::inverse_std(bn->running_var, eps_);
  // A channel whose gamma is 0 would divide by 0 below: keep its factor away from 0, where it still folds to almost nothing.
  constexpr double smallest = 1e-12;
  return torch::where(factor.abs() < smallest, torch::full_like(factor, smallest), factor);
}

std::pair<torch::Tensor, torch::Tensor> ConvBn2dImpl::folded() {
  const auto factor = fold_factor();
  const auto centered = bias.defined() ? bias - bn->running_mean : -bn->running_mean;
  return {weight * factor.view({-1, 1, 1, 1}), bn->bias + centered * factor};
}

torch::Tensor ConvBn2dImpl::pack(const torch::Tensor& x) {
  return pack_weight(options, weight, weight_scale_, *quant->find("input"), x);
}

void ConvBn2dImpl::after_convert() {
  unregister_module("bn");
  bn = nullptr;
}

torch::Tensor ConvBn2dImpl::forward(const torch::Tensor& x) {
  if (mode_ == Mode::floating) {
    return bn->forward(convolve(options, x, weight, bias));
  }
  if (mode_ == Mode::converted) {
    if (!executes_integers()) {
      return convolve(options, x, dequantized_weight(), bias);
    }
    const auto& packed_weight = packed(x);
    return convolve_integers(options, x, packed_weight, weight_scale_, bias, *quant->find("input"));
  }
  const auto input = quant->apply("input", x);
  if (!bn->is_training()) {
    const auto [folded_weight, folded_bias] = folded();
    return convolve(options, input, quant->apply("weight", folded_weight), folded_bias);
  }
  const auto factor = fold_factor();
  const auto scaled = quant->apply("weight", weight * factor.view({-1, 1, 1, 1}));
  auto out = convolve(options, input, scaled, torch::Tensor()) / factor.view({1, -1, 1, 1});
  if (bias.defined()) {
    out = out + bias.view({1, -1, 1, 1});
  }
  return bn->forward(out);
}

}  // namespace rarefy::nn
