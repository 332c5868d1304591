#pragma once

#include <ATen/core/Tensor.h>
#include <rarefy/export.h>
#include <rarefy/ops/distillation_loss.h>

#include <optional>

namespace rarefy::ops {

/// The distillation loss where of the teacher's logits the k largest are known, and the tail of the others at T:
///
///   alpha * T^2 * D(p, q) + (1 - alpha) * cross_entropy(student, label; label_smoothing)
///
/// with p and q over k + 1 outcomes, "class indices[j]" and "any other class" (compact_logits.h), and the cross-entropy over
/// all classes. With k = classes it is distillation_loss. Also torch.ops.rarefy.top_k_distillation_loss.
///   student_logits  [..., classes]. Differentiable once in them.
///   values          [..., k], the teacher's logits, taken in the dtype of the loss; indices int64 [..., k]; tail [...]
///   labels, row_weights and settings  as in distillation_loss.h. settings.temperature must be the tail's.
/// Throws as distillation_loss and compact_logits do.
RAREFY_API at::Tensor top_k_distillation_loss(const at::Tensor& student_logits, const at::Tensor& values,
                                              const at::Tensor& indices, const at::Tensor& tail,
                                              const std::optional<at::Tensor>& labels,
                                              const std::optional<at::Tensor>& row_weights,
                                              const DistillationLossSettings& settings);

}  // namespace rarefy::ops
