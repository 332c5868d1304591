#pragma once

#include <rarefy/nn/add.h>

namespace rarefy::nn {

/// a * b, a gate or a scaling. Prepared, both inputs are quantized, each with its own parameters
/// (`quant.input0`, `quant.input1`), as integer runtimes do.
class RAREFY_API MulImpl : public OperationModule<MulImpl> {
 public:
  void pretty_print(std::ostream& stream) const override;
  std::string kind() const override { return "Mul"; }
  /// a and b of one shape, or broadcastable.
  torch::Tensor forward(const torch::Tensor& a, const torch::Tensor& b);
};
TORCH_MODULE(Mul);

}  // namespace rarefy::nn
