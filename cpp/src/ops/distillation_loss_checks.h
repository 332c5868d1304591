// The argument rules of distillation_loss, applied by every backend's kernel.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/Exception.h>

#include <cmath>
#include <cstdint>
#include <optional>

namespace rarefy::ops {

inline void check_temperature(const char* function, double temperature) {
  TORCH_CHECK_VALUE(std::isfinite(temperature) && temperature > 0.0, "[", function,
                    "] temperature must be positive and finite, got ", temperature);
  // Its inverse and its square take part in float32.
  TORCH_CHECK_VALUE(temperature >= 1e-6 && temperature <= 1e6, "[", function,
                    "] temperature must be in [1e-6, 1e6], got ", temperature);
}

inline void check_alpha(const char* function, double alpha) {
  TORCH_CHECK_VALUE(alpha >= 0.0 && alpha <= 1.0, "[", function, "] alpha must be in [0, 1], got ", alpha);
}

/// Everything that can be checked without reading values.
inline void check_distillation_loss(const at::Tensor& student, const at::Tensor& teacher,
                                    const std::optional<at::Tensor>& labels, double temperature, double alpha) {
  constexpr const char* function = "distillation_loss";
  check_temperature(function, temperature);
  check_alpha(function, alpha);
  const auto type = student.scalar_type();
  TORCH_CHECK_TYPE(type == at::kFloat || type == at::kDouble || type == at::kBFloat16 || type == at::kHalf,
                   "[distillation_loss] student_logits must be float32, float64, bfloat16 or float16, got ", type);
  TORCH_CHECK_TYPE(teacher.scalar_type() == type, "[distillation_loss] teacher_logits must have the student's dtype ",
                   type, ", got ", teacher.scalar_type());
  TORCH_CHECK_VALUE(student.dim() >= 1, "[distillation_loss] logits must have shape [..., classes], got a scalar");
  TORCH_CHECK_VALUE(teacher.sym_sizes() == student.sym_sizes(),
                    "[distillation_loss] teacher_logits must have the student's shape ", student.sym_sizes(), ", got ",
                    teacher.sym_sizes());
  TORCH_CHECK_VALUE(teacher.device() == student.device(),
                    "[distillation_loss] teacher_logits must be on the student's device ", student.device(), ", got ",
                    teacher.device());
  TORCH_CHECK_VALUE(student.sym_size(-1) >= 1, "[distillation_loss] logits must have at least one class, got shape ",
                    student.sym_sizes());
  TORCH_CHECK_VALUE(student.sym_numel() >= 1, "[distillation_loss] logits must have at least one row, got shape ",
                    student.sym_sizes());
  if (!labels.has_value()) {
    TORCH_CHECK_VALUE(alpha == 1.0,
                      "[distillation_loss] labels must be given when alpha is below 1, got none with alpha ", alpha);
    return;
  }
  TORCH_CHECK_TYPE(labels->scalar_type() == at::kLong, "[distillation_loss] labels must be int64, got ",
                   labels->scalar_type());
  const auto rows = student.sym_sizes().slice(0, static_cast<size_t>(student.dim()) - 1);
  TORCH_CHECK_VALUE(labels->sym_sizes() == rows,
                    "[distillation_loss] labels must have the logits' shape without classes, ", rows, ", got ",
                    labels->sym_sizes());
  TORCH_CHECK_VALUE(labels->device() == student.device(), "[distillation_loss] labels must be on the logits' device ",
                    student.device(), ", got ", labels->device());
}

/// The dtype of the loss and of the computation.
inline at::ScalarType loss_type(const at::Tensor& logits) {
  return logits.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
}

}  // namespace rarefy::ops
