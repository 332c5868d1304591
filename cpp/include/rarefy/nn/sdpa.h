#pragma once

#include <rarefy/nn/add.h>

#include <optional>
#include <string>
#include <vector>

namespace rarefy::nn {

/// Scaled-dot-product attention, softmax(query key^T * scale + mask) value. Prepared, query, key, probabilities and value are
/// quantized, each with its own parameters (`quant.query`, `quant.key`, `quant.probabilities`, `quant.value`), as integer runtimes
/// multiply them; scores, mask and softmax are floating point. The products stay simulated after convert.
class RAREFY_API SDPAImpl : public OperationModule<SDPAImpl> {
 public:
  void pretty_print(std::ostream& stream) const override;
  std::string kind() const override { return "SDPA"; }
  /// query [..., target, features], key [..., source, features], value [..., source, values]; a mask of truth values is true where
  /// attention is allowed, one of numbers is added to the scores. scale unset: 1 / sqrt(features).
  /// Throws c10::ValueError for a mask beside is_causal.
  torch::Tensor forward(const torch::Tensor& query, const torch::Tensor& key, const torch::Tensor& value,
                        const torch::Tensor& attn_mask = {}, double dropout_p = 0, bool is_causal = false,
                        std::optional<double> scale = std::nullopt);

 protected:
  std::vector<std::string> inputs() const override { return {"query", "key", "probabilities", "value"}; }
};
TORCH_MODULE(SDPA);

}  // namespace rarefy::nn
