#include <ATen/ops/topk.h>
#include <rarefy/distillation/top_k.h>
#include <rarefy/ops/compact_logits.h>
#include <torch/utils.h>

namespace rarefy::distillation {

TopKLogits topk_logits(const torch::Tensor& logits, int64_t k, double temperature) {
  TORCH_CHECK_VALUE(logits.dim() >= 1, "[topk_logits] logits must have shape [..., classes], got a scalar");
  TORCH_CHECK_VALUE(k >= 1 && k <= logits.size(-1), "[topk_logits] k must be in [1, ", logits.size(-1), "], got ", k);
  const torch::NoGradGuard no_grad;
  const auto [values, indices] = at::topk(logits, k);
  return {values, indices, ops::compact_logits(logits, indices, temperature).select(-1, k).contiguous(), temperature,
          logits.size(-1)};
}

}  // namespace rarefy::distillation
