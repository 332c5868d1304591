#include <rarefy/nn/conv.h>

#include "nn/conv_module.h"

namespace rarefy::nn {

template <size_t D>
ConvImpl<D>::ConvImpl(ConvOptions<D> options_) : ConvModule<D, ConvImpl<D>>("Conv", std::move(options_)) {
  this->reset();
  this->reset_parameters();
}

template <size_t D>
ConvImpl<D>::ConvImpl(ConvOptions<D> options_, const torch::Tensor& given_weight, const torch::Tensor& given_bias)
    : ConvModule<D, ConvImpl<D>>("Conv", std::move(options_)) {
  this->reset();
  this->adopt(given_weight, given_bias);
}

template class ConvImpl<1>;
template class ConvImpl<2>;
template class ConvImpl<3>;

}  // namespace rarefy::nn
