#include "ops/distillation_rule.h"

#include <c10/util/Exception.h>

#include <array>
#include <cmath>
#include <utility>

namespace rarefy::ops {
namespace {

constexpr std::array<std::pair<std::string_view, Divergence>, 6> kDivergences{
    {{"kl", Divergence::kl},
     {"reverse_kl", Divergence::reverse_kl},
     {"jensen_shannon", Divergence::jensen_shannon},
     {"total_variation", Divergence::total_variation},
     {"skewed_kl", Divergence::skewed_kl},
     {"skewed_reverse_kl", Divergence::skewed_reverse_kl}}};

Divergence divergence_of(const char* function, std::string_view name) {
  for (const auto& [known, divergence] : kDivergences) {
    if (name == known) {
      return divergence;
    }
  }
  TORCH_CHECK_VALUE(false, "[", function,
                    "] divergence must be 'kl', 'reverse_kl', 'jensen_shannon', 'total_variation', 'skewed_kl' or "
                    "'skewed_reverse_kl', got '",
                    name, "'");
}

Reduction reduction_of(const char* function, std::string_view name) {
  TORCH_CHECK_VALUE(name == "mean" || name == "sum" || name == "none", "[", function,
                    "] reduction must be 'mean', 'sum' or 'none', got '", name, "'");
  return name == "mean" ? Reduction::mean : name == "sum" ? Reduction::sum : Reduction::none;
}

/// What the divergence is at this skew.
Divergence at_skew(Divergence divergence, double skew) {
  switch (divergence) {
    case Divergence::jensen_shannon:
      return skew == 0.0 ? Divergence::kl : skew == 1.0 ? Divergence::reverse_kl : divergence;
    case Divergence::skewed_kl:
      return skew == 0.0 ? Divergence::kl : divergence;
    case Divergence::skewed_reverse_kl:
      return skew == 0.0 ? Divergence::reverse_kl : divergence;
    default:
      return divergence;
  }
}

}  // namespace

DistillationRule resolve(const char* function, const DistillationLossSettings& settings) {
  const double t = settings.temperature, skew = settings.skew, smoothing = settings.label_smoothing;
  TORCH_CHECK_VALUE(std::isfinite(t) && t > 0.0, "[", function, "] temperature must be positive and finite, got ", t);
  // Its inverse and its square take part in float32.
  TORCH_CHECK_VALUE(t >= 1e-6 && t <= 1e6, "[", function, "] temperature must be in [1e-6, 1e6], got ", t);
  TORCH_CHECK_VALUE(settings.alpha >= 0.0 && settings.alpha <= 1.0, "[", function, "] alpha must be in [0, 1], got ",
                    settings.alpha);
  const auto divergence = divergence_of(function, settings.divergence);
  TORCH_CHECK_VALUE(skew >= 0.0 && skew <= 1.0, "[", function, "] skew must be in [0, 1], got ", skew);
  TORCH_CHECK_VALUE(skew < 1.0 || (divergence != Divergence::skewed_kl && divergence != Divergence::skewed_reverse_kl),
                    "[", function, "] skew must be below 1 for divergence '", settings.divergence,
                    "', which is 0 there, got ", skew);
  TORCH_CHECK_VALUE(smoothing >= 0.0 && smoothing <= 1.0, "[", function, "] label_smoothing must be in [0, 1], got ",
                    smoothing);
  return {t,
          settings.alpha,
          at_skew(divergence, skew),
          skew,
          smoothing,
          settings.ignore_index,
          reduction_of(function, settings.reduction)};
}

void check_distillation_loss(const at::Tensor& student, const at::Tensor& teacher,
                             const std::optional<at::Tensor>& labels, const std::optional<at::Tensor>& row_weights,
                             const DistillationRule& rule) {
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
  const auto rows = student.sym_sizes().slice(0, static_cast<size_t>(student.dim()) - 1);
  if (row_weights.has_value()) {
    TORCH_CHECK_TYPE(at::isFloatingType(row_weights->scalar_type()),
                     "[distillation_loss] row_weights must be floating point, got ", row_weights->scalar_type());
    TORCH_CHECK_VALUE(row_weights->sym_sizes() == rows,
                      "[distillation_loss] row_weights must have the logits' shape without classes, ", rows, ", got ",
                      row_weights->sym_sizes());
    TORCH_CHECK_VALUE(row_weights->device() == student.device(),
                      "[distillation_loss] row_weights must be on the logits' device ", student.device(), ", got ",
                      row_weights->device());
  }
  if (!labels.has_value()) {
    TORCH_CHECK_VALUE(!rule.hard(),
                      "[distillation_loss] labels must be given when alpha is below 1, got none with alpha ",
                      rule.alpha);
    return;
  }
  TORCH_CHECK_TYPE(labels->scalar_type() == at::kLong, "[distillation_loss] labels must be int64, got ",
                   labels->scalar_type());
  TORCH_CHECK_VALUE(labels->sym_sizes() == rows,
                    "[distillation_loss] labels must have the logits' shape without classes, ", rows, ", got ",
                    labels->sym_sizes());
  TORCH_CHECK_VALUE(labels->device() == student.device(), "[distillation_loss] labels must be on the logits' device ",
                    student.device(), ", got ", labels->device());
}

}  // namespace rarefy::ops
