// DistillationLossSettings checked and resolved, and the argument rules of distillation_loss that every backend applies.
#pragma once

#include <ATen/core/Tensor.h>
#include <rarefy/ops/distillation_loss.h>

#include <cstdint>
#include <optional>
#include <string_view>

#include "ops/divergence.h"

namespace rarefy::ops {

/// What the settings mean: a skew at the end of its range has become the divergence that it stands for.
struct DistillationRule {
  double temperature;
  double alpha;
  Divergence divergence;
  double skew;
  double label_smoothing;
  int64_t ignore_index;
  Reduction reduction;

  bool soft() const { return alpha > 0.0; }
  bool hard() const { return alpha < 1.0; }
};

/// Throws c10::ValueError, in the name of `function`, for a setting out of range.
DistillationRule resolve(const char* function, const DistillationLossSettings& settings);

/// Everything about the tensors that can be checked without reading values.
void check_distillation_loss(const at::Tensor& student, const at::Tensor& teacher,
                             const std::optional<at::Tensor>& labels, const std::optional<at::Tensor>& row_weights,
                             const DistillationRule& rule);

/// The dtype of the loss and of the computation.
inline at::ScalarType loss_type(const at::Tensor& logits) {
  return logits.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
}

/// The dispatcher's argument list, with the settings put together for `kernel`.
template <auto kernel>
auto with_settings(const at::Tensor& student_logits, const at::Tensor& teacher_logits,
                   const std::optional<at::Tensor>& labels, const std::optional<at::Tensor>& row_weights,
                   double temperature, double alpha, std::string_view divergence, double skew, double label_smoothing,
                   int64_t ignore_index, std::string_view reduction) {
  return kernel(student_logits, teacher_logits, labels, row_weights,
                DistillationLossSettings{temperature, alpha, std::string(divergence), skew, label_smoothing,
                                         ignore_index, std::string(reduction)});
}

}  // namespace rarefy::ops
