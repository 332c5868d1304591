#pragma once

#include <rarefy/nn/quantizable.h>

namespace rarefy::nn {

/// a + b, the residual addition. Prepared, both inputs are quantized, each with its own parameters
/// (`quant.input0`, `quant.input1`), as integer runtimes do.
class RAREFY_API AddImpl : public torch::nn::Cloneable<AddImpl>, public Quantizable {
 public:
  AddImpl() = default;
  void reset() override;
  void pretty_print(std::ostream& stream) const override;
  std::string kind() const override { return "Add"; }
  void prepare(const quantization::LayerConfig& config, const quantization::Observer& default_observer) override;
  void convert() override { mode_ = Mode::converted; }

  /// a and b of one shape, or broadcastable.
  torch::Tensor forward(const torch::Tensor& a, const torch::Tensor& b);

 private:
  QuantStateImpl::Specs specs_;
};
TORCH_MODULE(Add);

}  // namespace rarefy::nn
