#pragma once

#include <rarefy/nn/weighted.h>
#include <rarefy/ops/conv_transpose.h>
#include <torch/nn/modules/common.h>
#include <torch/nn/modules/container/any.h>
#include <torch/nn/options/conv.h>

namespace rarefy::nn {

template <size_t D>
using ConvTransposeOptions = torch::nn::ConvTransposeOptions<D>;
using ConvTranspose1dOptions = ConvTransposeOptions<1>;
using ConvTranspose2dOptions = ConvTransposeOptions<2>;
using ConvTranspose3dOptions = ConvTransposeOptions<3>;

/// Takes the place of torch::nn::ConvTranspose1d, 2d, 3d: x [N, in, spatial...] to [N, out, spatial...]. Floating point until
/// rarefy::quantization::prepare_qat or prepare; int8 after convert. Same parameter names and initialization.
///
/// The weight is [in, out / groups, kernel...]: scales per channel are on axis 1, with one for each of the `out` channels, so
/// that every group has scales of its own (the scale of channel o of group g is number g * (out / groups) + o).
template <size_t D>
class RAREFY_API ConvTransposeImpl : public WeightedModule<ConvTransposeImpl<D>> {
 public:
  ConvTransposeImpl(int64_t in_channels, int64_t out_channels, torch::ExpandingArray<D> kernel_size)
      : ConvTransposeImpl(ConvTransposeOptions<D>(in_channels, out_channels, kernel_size)) {}
  /// Throws c10::ValueError for channels that groups do not divide, and for a padding mode other than zeros.
  explicit ConvTransposeImpl(ConvTransposeOptions<D> options);
  /// Over parameters that exist: weight [in, out / groups, kernel...], bias [out] or undefined.
  ConvTransposeImpl(ConvTransposeOptions<D> options, const torch::Tensor& given_weight,
                    const torch::Tensor& given_bias);

  void reset_parameters();
  void pretty_print(std::ostream& stream) const override;
  std::string kind() const override { return "ConvTranspose" + std::to_string(D) + "d"; }
  int64_t channel_axis() const override { return 1; }
  int64_t channels() const override { return options.out_channels(); }
  bool has_scales_of_groups() const override { return options.groups() > 1; }
  std::optional<int64_t> input_axis(int64_t dims) const override { return dims - static_cast<int64_t>(D) - 1; }
  torch::Tensor by_input(const torch::Tensor& values) const override {
    // By channel the weight is [in / groups, out, ...], and each group of outputs reads the inputs of its own group.
    std::vector<int64_t> shape(D + 2, 1);
    shape[0] = values.numel() / options.groups();
    shape[1] = -1;
    const auto columns = values.view({options.groups(), -1}).t();
    return (options.groups() == 1 ? columns : columns.repeat_interleave(options.out_channels() / options.groups(), 1))
        .reshape(shape);
  }
  /// With the output padding that gives the spatial sizes `output_size`, where they are told.
  torch::Tensor forward(const torch::Tensor& x, const std::optional<at::IntArrayRef>& output_size = std::nullopt);

  ConvTransposeOptions<D> options;

 protected:
  void register_floating() override;
  torch::Tensor by_channel(const torch::Tensor& w) const override {
    return ops::weight_by_channel(w, options.groups());
  }
  torch::Tensor as_stored(const torch::Tensor& w) const override { return ops::weight_by_group(w, options.groups()); }
  torch::Tensor compute(const torch::Tensor& x, const torch::Tensor& w, const torch::Tensor& b) override;
  torch::Tensor compute_integer(const torch::Tensor& x, const torch::Tensor& w, const torch::Tensor& factor,
                                const torch::Tensor& b, const ops::IntegerGrids& grids,
                                const ops::IntegerOptions& options) override;
  bool trains_in_integers_by_default() const override { return false; }
  std::optional<std::string> why_never_integer(const quantization::LayerConfig& config) const override;
  torch::Tensor execute(const torch::Tensor& x) override;
  FORWARD_HAS_DEFAULT_ARGS({1, torch::nn::AnyValue(std::optional<at::IntArrayRef>())})

 private:
  ops::TransposedMovement movement() const;

  std::vector<int64_t> output_padding_;  // of the call that runs
};

extern template class ConvTransposeImpl<1>;
extern template class ConvTransposeImpl<2>;
extern template class ConvTransposeImpl<3>;
using ConvTranspose1dImpl = ConvTransposeImpl<1>;
using ConvTranspose2dImpl = ConvTransposeImpl<2>;
using ConvTranspose3dImpl = ConvTransposeImpl<3>;
TORCH_MODULE(ConvTranspose1d);
TORCH_MODULE(ConvTranspose2d);
TORCH_MODULE(ConvTranspose3d);

}  // namespace rarefy::nn
