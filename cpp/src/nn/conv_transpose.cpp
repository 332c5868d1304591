#include <ATen/ops/conv_transpose1d.h>
#include <ATen/ops/conv_transpose2d.h>
#include <ATen/ops/conv_transpose3d.h>
#include <rarefy/nn/conv_transpose.h>
#include <torch/nn/init.h>

#include <algorithm>
#include <cmath>
#include <ostream>
#include <variant>

namespace rarefy::nn {

namespace {

template <size_t D>
std::vector<int64_t> numbers(const torch::ExpandingArray<D>& values) {
  return {values->begin(), values->end()};
}

template <size_t D>
ConvTransposeOptions<D> checked(ConvTransposeOptions<D> options) {
  const auto in = options.in_channels(), out = options.out_channels(), groups = options.groups();
  TORCH_CHECK_VALUE(groups > 0 && in % groups == 0 && out % groups == 0, "[ConvTranspose", D,
                    "d] groups must divide the channels, got ", groups, " groups for ", in, " and ", out, " channels");
  TORCH_CHECK_VALUE(std::holds_alternative<torch::enumtype::kZeros>(options.padding_mode()), "[ConvTranspose", D,
                    "d] padding_mode must be zeros");
  return options;
}

}  // namespace

template <size_t D>
ConvTransposeImpl<D>::ConvTransposeImpl(ConvTransposeOptions<D> options_)
    : options(checked(std::move(options_))), output_padding_(numbers<D>(options.output_padding())) {
  this->reset();
  reset_parameters();
}

template <size_t D>
ConvTransposeImpl<D>::ConvTransposeImpl(ConvTransposeOptions<D> options_, const torch::Tensor& given_weight,
                                        const torch::Tensor& given_bias)
    : options(checked(std::move(options_))), output_padding_(numbers<D>(options.output_padding())) {
  this->reset();
  this->adopt(given_weight, given_bias);
}

template <size_t D>
void ConvTransposeImpl<D>::register_floating() {
  std::vector<int64_t> shape{options.in_channels(), options.out_channels() / options.groups()};
  shape.insert(shape.end(), options.kernel_size()->begin(), options.kernel_size()->end());
  this->weight = this->register_parameter("weight", torch::empty(shape));
  this->bias =
      options.bias() ? this->register_parameter("bias", torch::empty({options.out_channels()})) : torch::Tensor();
}

template <size_t D>
void ConvTransposeImpl<D>::reset_parameters() {
  torch::nn::init::kaiming_uniform_(this->weight, std::sqrt(5.0));
  if (this->bias.defined()) {
    const double bound = 1.0 / std::sqrt(static_cast<double>(this->weight[0].numel()));
    torch::nn::init::uniform_(this->bias, -bound, bound);
  }
}

template <size_t D>
void ConvTransposeImpl<D>::pretty_print(std::ostream& stream) const {
  stream << "rarefy::nn::" << kind() << "(" << options.in_channels() << ", " << options.out_channels()
         << ", kernel_size=" << options.kernel_size() << ", stride=" << options.stride() << ")";
}

template <size_t D>
ops::TransposedMovement ConvTransposeImpl<D>::movement() const {
  return {numbers<D>(options.stride()), numbers<D>(options.padding()), output_padding_, numbers<D>(options.dilation()),
          options.groups()};
}

template <size_t D>
torch::Tensor ConvTransposeImpl<D>::forward(const torch::Tensor& x, const std::optional<at::IntArrayRef>& output_size) {
  output_padding_ = numbers<D>(options.output_padding());
  if (output_size.has_value()) {
    TORCH_CHECK_VALUE(output_size->size() == D, "[", kind(), "] output_size must have ", D, " values, got ",
                      output_size->size());
    for (size_t i = 0; i < D; ++i) {
      const auto m = movement();
      const auto in = x.size(x.dim() - static_cast<int64_t>(D - i));
      const auto least =
          (in - 1) * m.stride[i] - 2 * m.padding[i] + m.dilation[i] * ((*options.kernel_size())[i] - 1) + 1;
      const auto more = (*output_size)[i] - least, room = std::max(m.stride[i], m.dilation[i]);
      TORCH_CHECK_VALUE(more >= 0 && more < room, "[", kind(), "] output_size must be within [", least, ", ",
                        least + room - 1, "], got ", (*output_size)[i]);
      output_padding_[i] = more;
    }
  }
  return this->run(x);
}

template <size_t D>
torch::Tensor ConvTransposeImpl<D>::compute(const torch::Tensor& x, const torch::Tensor& w, const torch::Tensor& b) {
  const auto m = movement();
  if constexpr (D == 1) {
    return at::conv_transpose1d(x, w, b, m.stride, m.padding, m.output_padding, m.groups, m.dilation);
  } else if constexpr (D == 2) {
    return at::conv_transpose2d(x, w, b, m.stride, m.padding, m.output_padding, m.groups, m.dilation);
  } else {
    return at::conv_transpose3d(x, w, b, m.stride, m.padding, m.output_padding, m.groups, m.dilation);
  }
}

template <size_t D>
std::optional<std::string> ConvTransposeImpl<D>::why_never_integer(const quantization::LayerConfig& config) const {
  if (D == 3 && options.groups() > 1) {
    return "there is no integer kernel for groups in three dimensions";
  }
  return WeightedModule<ConvTransposeImpl<D>>::why_never_integer(config);
}

template <size_t D>
torch::Tensor ConvTransposeImpl<D>::compute_integer(const torch::Tensor& x, const torch::Tensor& w,
                                                    const torch::Tensor& factor, const torch::Tensor& b,
                                                    const ops::IntegerGrids& grids,
                                                    const ops::IntegerOptions& options_) {
  if (x.dim() == static_cast<int64_t>(D) + 1) {  // one sample without a batch dimension
    return compute_integer(x.unsqueeze(0), w, factor, b, grids, options_).squeeze(0);
  }
  return ops::integer_conv_transpose(x, w, b.defined() ? std::optional(b) : std::nullopt, grids, movement(), options_);
}

template <size_t D>
torch::Tensor ConvTransposeImpl<D>::execute(const torch::Tensor& x) {
  if (x.dim() == static_cast<int64_t>(D) + 1) {  // one sample without a batch dimension
    return execute(x.unsqueeze(0)).squeeze(0);
  }
  return ops::quantized_conv_transpose(x, this->weight, this->weight_scale(), this->optional_bias(),
                                       this->quant->grid("input"), movement(), this->relu(),
                                       this->quant->output_grid());
}

template class ConvTransposeImpl<1>;
template class ConvTransposeImpl<2>;
template class ConvTransposeImpl<3>;

}  // namespace rarefy::nn
