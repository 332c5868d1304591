#pragma once

#include <rarefy/export.h>
#include <rarefy/ops/distillation_loss.h>
#include <torch/types.h>

#include <cstdint>
#include <optional>

namespace rarefy::distillation {

/// What is kept of a teacher's logits: the k largest and one number for all others. Together they are the logits of k + 1
/// outcomes, "class indices[j]" and "any other class", at one temperature T.
struct RAREFY_API TopKLogits {
  torch::Tensor values;   // [..., k], the teacher's logits, largest first
  torch::Tensor indices;  // int64 [..., k], their classes, each one once in a row
  torch::Tensor tail;     // [...], T * logsumexp of the other logits / T; -inf where there are none
  double temperature;     // T > 0: tail holds for this one
  int64_t classes = 0;    // of the teacher; 0 when it is not known
};

/// The k largest logits of [..., classes] and the tail of the others. 1 <= k <= classes. values have the logits' dtype; tail is
/// float32 (float64 for float64). Not differentiable. Throws c10::ValueError for k or T out of range.
RAREFY_API TopKLogits topk_logits(const torch::Tensor& logits, int64_t k, double temperature);

/// The loss of ops::top_k_distillation_loss, after checking that the teacher's classes (where known) and temperature are the
/// student's and the settings'. Labels and row weights may be undefined. Throws c10::ValueError when they are not.
RAREFY_API torch::Tensor top_k_distillation_loss(const torch::Tensor& student_logits, const TopKLogits& teacher,
                                                 const torch::Tensor& labels, const torch::Tensor& row_weights,
                                                 const ops::DistillationLossSettings& settings);

}  // namespace rarefy::distillation
