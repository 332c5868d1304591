// The members of ConvModule, for the files that instantiate it.
#pragma once

#include <ATen/ops/conv1d.h>
#include <ATen/ops/conv2d.h>
#include <ATen/ops/conv3d.h>
#include <ATen/ops/pad.h>
#include <rarefy/nn/conv.h>
#include <rarefy/ops/quantized.h>
#include <torch/nn/init.h>

#include <algorithm>
#include <cmath>
#include <ostream>
#include <string_view>

namespace rarefy::nn {

/// How a convolution moves over its input, in numbers. `pad` comes first, by `mode`; then the convolution itself.
struct Geometry {
  std::vector<int64_t> stride, padding, dilation;
  int64_t groups;
  std::vector<int64_t> pad;  // last dimension first, as at::pad takes it; empty when padding says everything
  const char* mode;

  /// x with what the convolution does not pad by itself. Values on a grid stay on it, as it holds 0.
  torch::Tensor padded(const torch::Tensor& x) const { return pad.empty() ? x : at::pad(x, pad, mode); }

  /// Zeros before and after every dimension; for a padding of zeros.
  std::vector<int64_t> sides() const {
    if (pad.empty()) {
      return padding;
    }
    std::vector<int64_t> out;
    for (size_t i = pad.size(); i > 0; i -= 2) {  // pad has the last dimension first
      out.push_back(pad[i - 2]);
      out.push_back(pad[i - 1]);
    }
    return out;
  }

  torch::Tensor convolve(const torch::Tensor& x, const torch::Tensor& weight, const torch::Tensor& bias) const {
    const auto input = padded(x);
    switch (weight.dim()) {
      case 3:
        return at::conv1d(input, weight, bias, stride, padding, dilation, groups);
      case 4:
        return at::conv2d(input, weight, bias, stride, padding, dilation, groups);
      default:
        return at::conv3d(input, weight, bias, stride, padding, dilation, groups);
    }
  }
};

template <size_t D>
Geometry geometry_of(const ConvOptions<D>& options) {
  const auto list = [](const torch::ExpandingArray<D>& values) {
    return std::vector<int64_t>(values->begin(), values->end());
  };
  Geometry g{list(options.stride()), {}, list(options.dilation()), options.groups(), {}, "constant"};
  const auto* mode = std::holds_alternative<torch::enumtype::kReflect>(options.padding_mode())     ? "reflect"
                     : std::holds_alternative<torch::enumtype::kReplicate>(options.padding_mode()) ? "replicate"
                     : std::holds_alternative<torch::enumtype::kCircular>(options.padding_mode())  ? "circular"
                                                                                                   : nullptr;
  std::vector<int64_t> before(D, 0), after(D, 0);
  for (size_t i = 0; i < D; ++i) {
    if (std::holds_alternative<torch::enumtype::kSame>(options.padding())) {
      const int64_t total = g.dilation[i] * (options.kernel_size()->at(i) - 1);
      before[i] = total / 2;
      after[i] = total - total / 2;
    } else if (const auto* numbers = std::get_if<torch::ExpandingArray<D>>(&options.padding())) {
      before[i] = after[i] = (*numbers)->at(i);
    }
  }
  g.padding.assign(D, 0);
  if (mode == nullptr && before == after) {
    g.padding = before;
    return g;
  }
  g.mode = mode == nullptr ? "constant" : mode;
  for (size_t i = D; i-- > 0;) {
    g.pad.push_back(before[i]);
    g.pad.push_back(after[i]);
  }
  return g;
}

template <size_t D, typename Derived>
ConvModule<D, Derived>::ConvModule(std::string name, ConvOptions<D> options_)
    : options(std::move(options_)), name_(std::move(name)) {
  TORCH_CHECK_VALUE(options.groups() > 0 && options.in_channels() % options.groups() == 0 &&
                        options.out_channels() % options.groups() == 0,
                    "[", name_, D, "d] groups must divide the channels, got ", options.groups(), " groups for ",
                    options.in_channels(), " and ", options.out_channels(), " channels");
}

template <size_t D, typename Derived>
void ConvModule<D, Derived>::register_floating() {
  std::vector<int64_t> shape{options.out_channels(), options.in_channels() / options.groups()};
  shape.insert(shape.end(), options.kernel_size()->begin(), options.kernel_size()->end());
  this->weight = this->register_parameter("weight", torch::empty(shape));
  this->bias =
      options.bias() ? this->register_parameter("bias", torch::empty({options.out_channels()})) : torch::Tensor();
}

template <size_t D, typename Derived>
void ConvModule<D, Derived>::reset_parameters() {
  torch::nn::init::kaiming_uniform_(this->weight, std::sqrt(5.0));
  if (this->bias.defined()) {
    const double bound = 1.0 / std::sqrt(static_cast<double>(this->weight[0].numel()));
    torch::nn::init::uniform_(this->bias, -bound, bound);
  }
}

template <size_t D, typename Derived>
void ConvModule<D, Derived>::pretty_print(std::ostream& stream) const {
  stream << "rarefy::nn::" << kind() << "(" << options.in_channels() << ", " << options.out_channels()
         << ", kernel_size=" << options.kernel_size() << ", stride=" << options.stride() << ")";
}

template <size_t D, typename Derived>
torch::Tensor ConvModule<D, Derived>::compute(const torch::Tensor& x, const torch::Tensor& w, const torch::Tensor& b) {
  return geometry_of(options).convolve(x, w, b);
}

template <size_t D, typename Derived>
std::optional<std::string> ConvModule<D, Derived>::why_never_integer(const quantization::LayerConfig& config) const {
  if (D == 3 && options.groups() > 1) {
    return "there is no integer kernel for groups in three dimensions";
  }
  return WeightedModule<Derived>::why_never_integer(config);
}

template <size_t D, typename Derived>
torch::Tensor ConvModule<D, Derived>::compute_integer(const torch::Tensor& x, const torch::Tensor& w,
                                                      const torch::Tensor& factor, const torch::Tensor& b,
                                                      const ops::IntegerGrids& grids,
                                                      const ops::IntegerOptions& options_) {
  if (x.dim() == static_cast<int64_t>(D) + 1) {  // one sample without a batch dimension
    return compute_integer(x.unsqueeze(0), w, factor, b, grids, options_).squeeze(0);
  }
  const auto g = geometry_of(options);
  const auto optional = [](const torch::Tensor& t) { return t.defined() ? std::optional(t) : std::nullopt; };
  return ops::integer_conv(g.padded(x), w, optional(factor), optional(b), grids, g.stride, g.padding, g.dilation,
                           g.groups, options_);
}

template <size_t D, typename Derived>
torch::Tensor ConvModule<D, Derived>::execute(const torch::Tensor& x) {
  if (x.dim() == static_cast<int64_t>(D) + 1) {  // one sample without a batch dimension
    return execute(x.unsqueeze(0)).squeeze(0);
  }
  const auto g = geometry_of(options);
  // Zeros around bytes are the zero point's, which the operator knows.
  const bool zeros = std::string_view(g.mode) == "constant";
  return ops::quantized_conv(zeros ? x : g.padded(x), this->weight, this->weight_scale(), this->optional_bias(),
                             this->quant->grid("input"), g.stride, zeros ? g.sides() : g.padding, g.dilation, g.groups,
                             this->relu(), this->quant->output_grid());
}

}  // namespace rarefy::nn
