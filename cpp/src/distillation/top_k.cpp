#include <ATen/ops/topk.h>
#include <rarefy/distillation/top_k.h>
#include <rarefy/ops/compact_logits.h>
#include <rarefy/ops/top_k_distillation_loss.h>
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

torch::Tensor top_k_distillation_loss(const torch::Tensor& student_logits, const TopKLogits& teacher,
                                      const torch::Tensor& labels, const torch::Tensor& row_weights,
                                      const ops::DistillationLossSettings& settings) {
  TORCH_CHECK_VALUE(teacher.temperature == settings.temperature,
                    "[top_k_distillation_loss] the teacher's tail must be of the loss's temperature ",
                    settings.temperature, ", got ", teacher.temperature);
  TORCH_CHECK_VALUE(teacher.classes == 0 || (student_logits.dim() >= 1 && student_logits.size(-1) == teacher.classes),
                    "[top_k_distillation_loss] student_logits must have the teacher's ", teacher.classes,
                    " classes, got ", student_logits.sizes());
  const auto given = [](const torch::Tensor& x) { return x.defined() ? std::optional<at::Tensor>(x) : std::nullopt; };
  return ops::top_k_distillation_loss(student_logits, teacher.values, teacher.indices, teacher.tail, given(labels),
                                      given(row_weights), settings);
}

}  // namespace rarefy::distillation
