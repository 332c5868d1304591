#pragma once

#include <rarefy/nn/weighted.h>
#include <torch/nn/options/conv.h>

namespace rarefy::nn {

template <size_t D>
using ConvOptions = torch::nn::ConvOptions<D>;
using Conv1dOptions = ConvOptions<1>;
using Conv2dOptions = ConvOptions<2>;
using Conv3dOptions = ConvOptions<3>;

/// What convolutions of D dimensions share, with batch normalization or without: the options of torch's, every padding
/// and padding mode included.
template <size_t D, typename Derived>
class RAREFY_API ConvModule : public WeightedModule<Derived> {
 public:
  void reset_parameters();
  void pretty_print(std::ostream& stream) const override;
  std::string kind() const override { return name_ + std::to_string(D) + "d"; }
  std::optional<int64_t> input_axis(int64_t dims) const override { return dims - static_cast<int64_t>(D) - 1; }
  torch::Tensor by_input(const torch::Tensor& values) const override {
    // Each group of outputs reads the inputs of its own group.
    std::vector<int64_t> shape(D + 2, 1);
    shape[0] = -1;
    shape[1] = values.numel() / options.groups();
    const auto rows = values.view({options.groups(), -1});
    return (options.groups() == 1 ? rows : rows.repeat_interleave(options.out_channels() / options.groups(), 0))
        .reshape(shape);
  }

  ConvOptions<D> options;

 protected:
  /// Throws c10::ValueError for channels that groups do not divide.
  ConvModule(std::string name, ConvOptions<D> options);

  void register_floating() override;
  torch::Tensor compute(const torch::Tensor& x, const torch::Tensor& w, const torch::Tensor& b) override;
  torch::Tensor compute_integer(const torch::Tensor& x, const torch::Tensor& w, const torch::Tensor& factor,
                                const torch::Tensor& b, const ops::IntegerGrids& grids,
                                const ops::IntegerOptions& options) override;
  std::optional<std::string> why_never_integer(const quantization::LayerConfig& config) const override;
  torch::Tensor execute(const torch::Tensor& x) override;

 private:
  std::string name_;
};

/// Takes the place of torch::nn::Conv1d, 2d, 3d: x [N, in, spatial...] to [N, out, spatial...]. Floating point until
/// rarefy::quantization::prepare_qat or prepare; int8 after convert. Same parameter names and initialization.
template <size_t D>
class RAREFY_API ConvImpl : public ConvModule<D, ConvImpl<D>> {
 public:
  ConvImpl(int64_t in_channels, int64_t out_channels, torch::ExpandingArray<D> kernel_size)
      : ConvImpl(ConvOptions<D>(in_channels, out_channels, kernel_size)) {}
  /// Throws c10::ValueError for channels that groups do not divide.
  explicit ConvImpl(ConvOptions<D> options);
  /// Over parameters that exist: weight [out, in / groups, kernel...], bias [out] or undefined.
  ConvImpl(ConvOptions<D> options, const torch::Tensor& given_weight, const torch::Tensor& given_bias);

  torch::Tensor forward(const torch::Tensor& x) { return this->run(x); }
};

extern template class ConvImpl<1>;
extern template class ConvImpl<2>;
extern template class ConvImpl<3>;
using Conv1dImpl = ConvImpl<1>;
using Conv2dImpl = ConvImpl<2>;
using Conv3dImpl = ConvImpl<3>;
TORCH_MODULE(Conv1d);
TORCH_MODULE(Conv2d);
TORCH_MODULE(Conv3d);

}  // namespace rarefy::nn
