#include "ops/cpu/distillation_rows.h"

#include <ATen/Parallel.h>
#include <c10/util/Exception.h>

#include <algorithm>
#include <cmath>
#include <memory>

#include "ops/cpu/distillation_loss_simd.h"
#include "ops/cpu/distillation_row_double.h"

namespace rarefy::ops {
namespace {

constexpr int64_t kGrain = 16384;  // elements below which a second thread does not pay

cpu::FloatType float_type(const at::Tensor& x) {
  return x.scalar_type() == at::kBFloat16 ? cpu::FloatType::bf16
         : x.scalar_type() == at::kHalf   ? cpu::FloatType::f16
                                          : cpu::FloatType::f32;
}

/// k when temperature is 2^k and squaring k times costs less accuracy than it is worth; -1 otherwise.
int squarings_of(double temperature) {
  // Each squaring doubles the relative error: 8 ulp of an exponential at T = 8.
  return temperature == 1.0 ? 0 : temperature == 2.0 ? 1 : temperature == 4.0 ? 2 : temperature == 8.0 ? 3 : -1;
}

/// The divergence of one row from its sums. Rounding may leave it below 0.
double divergence_of(const DistillationRule& rule, const cpu::DistillationSums& sums) {
  // log p - log q = ((t - r_t) - (s - r_s)) / T - log sum_t + log sum_s, weighted by p or by q.
  const double log_sums = std::log(sums.soft_student) - std::log(sums.soft_teacher);
  double value = sums.divergence;
  if (rule.divergence == Divergence::kl) {
    value = sums.divergence / (rule.temperature * sums.soft_teacher) + log_sums;
  } else if (rule.divergence == Divergence::reverse_kl) {
    value = sums.divergence / (rule.temperature * sums.soft_student) - log_sums;
  }
  return value < 0.0 ? 0.0 : value;
}

/// The loss of one row from its sums.
double row_loss(const DistillationRule& rule, int64_t classes, const cpu::DistillationSums& sums) {
  double loss = 0.0;
  if (rule.soft()) {
    loss += rule.alpha * rule.temperature * rule.temperature * divergence_of(rule, sums);
  }
  if (rule.hard()) {
    const double log_sum = std::log(sums.hard_student), reference = static_cast<double>(sums.reference);
    const double label = static_cast<double>(sums.label_logit) - reference;
    double cross_entropy = (1.0 - rule.label_smoothing) * (log_sum - label);
    if (rule.label_smoothing > 0.0) {
      cross_entropy += rule.label_smoothing * (log_sum - sums.student_sum / static_cast<double>(classes));
    }
    loss += (1.0 - rule.alpha) * cross_entropy;
  }
  return loss;
}

/// Runs body(row, its gradient or null, its place in the losses) on every valid row; the others get 0.
template <typename Body>
void for_valid_rows(const DistillationRows& rows, const DistillationRule& rule, const at::Tensor& grad, double* losses,
                    int64_t begin, int64_t end, Body body) {
  auto* out = grad.defined() ? static_cast<char*>(grad.data_ptr()) : nullptr;
  const auto row_bytes = rows.classes * static_cast<int64_t>(rows.student.element_size());
  for (int64_t row = begin; row < end; ++row) {
    char* row_grad = out == nullptr ? nullptr : out + row * row_bytes;
    if (rows.is_valid(row, rule)) {
      losses[row] = rows.weight(row) * body(row, row_grad);
      continue;
    }
    losses[row] = 0.0;
    if (row_grad != nullptr) {
      std::fill_n(row_grad, row_bytes, char{0});
    }
  }
}

void run_float(const DistillationRows& rows, const DistillationRule& rule, double scale, const at::Tensor& grad,
               double* losses) {
  const cpu::DistillationTask task{float_type(rows.student),
                                   rows.classes,
                                   rule.soft(),
                                   rule.hard(),
                                   rule.divergence,
                                   static_cast<float>(rule.skew),
                                   static_cast<float>(rule.label_smoothing),
                                   squarings_of(rule.temperature),
                                   static_cast<float>(rule.temperature),
                                   static_cast<float>(1.4426950408889634 / rule.temperature),
                                   rule.alpha * rule.temperature * scale,
                                   (1.0 - rule.alpha) * scale};
  const auto* student = static_cast<const char*>(rows.student.const_data_ptr());
  const auto* teacher = static_cast<const char*>(rows.teacher.const_data_ptr());
  const auto row_bytes = rows.classes * static_cast<int64_t>(rows.student.element_size());
  at::parallel_for(0, rows.count, std::max<int64_t>(1, kGrain / rows.classes), [&](int64_t begin, int64_t end) {
    const auto scratch =
        std::unique_ptr<float[]>(new float[static_cast<size_t>(cpu::distillation_scratch(rows.classes))]);
    for_valid_rows(rows, rule, grad, losses, begin, end, [&](int64_t row, char* row_grad) {
      const cpu::DistillationRow arguments{
          student + row * row_bytes,         teacher + row * row_bytes, row_grad, scratch.get(),
          rule.hard() ? rows.label(row) : 0, rows.weight(row)};
      return row_loss(rule, rows.classes, RAREFY_ISA_CALL(distill_row, task, arguments));
    });
  });
}

void run_double(const DistillationRows& rows, const DistillationRule& rule, double scale, const at::Tensor& grad,
                double* losses) {
  const double* students = rows.student.const_data_ptr<double>();
  const double* teachers = rows.teacher.const_data_ptr<double>();
  const int64_t n = rows.classes;
  at::parallel_for(0, rows.count, std::max<int64_t>(1, kGrain / n), [&](int64_t begin, int64_t end) {
    DoubleRowDistiller distiller(rule, n);
    for_valid_rows(rows, rule, grad, losses, begin, end, [&](int64_t row, char* row_grad) {
      return distiller.run(students + row * n, teachers + row * n, rule.hard() ? rows.label(row) : 0,
                           scale * rows.weight(row), reinterpret_cast<double*>(row_grad));
    });
  });
}

}  // namespace

DistillationRows::DistillationRows(const at::Tensor& student_logits, const at::Tensor& teacher_logits,
                                   const std::optional<at::Tensor>& given_labels,
                                   const std::optional<at::Tensor>& row_weights, const DistillationRule& rule) {
  check_distillation_loss(student_logits, teacher_logits, given_labels, row_weights, rule);
  student = student_logits.contiguous();
  teacher = teacher_logits.contiguous();
  classes = student.size(-1);
  count = student.numel() / classes;
  if (given_labels.has_value()) {
    labels = given_labels->contiguous();
  }
  if (row_weights.has_value()) {
    weights = row_weights->to(at::kDouble).contiguous();
  }
  total_weight = 0.0;
  for (int64_t row = 0; row < count; ++row) {
    const double w = weight(row);
    TORCH_CHECK_VALUE(w >= 0.0 && std::isfinite(w), "[distillation_loss] row_weights must be finite and >= 0, got ", w,
                      " at row ", row);
    if (is_valid(row, rule)) {
      TORCH_CHECK_INDEX(!labels.defined() || (label(row) >= 0 && label(row) < classes),
                        "[distillation_loss] labels must be in [0, ", classes, ") or ignore_index (", rule.ignore_index,
                        "), got ", label(row), " at row ", row);
      total_weight += w;
    }
  }
}

void distill_rows(const DistillationRows& rows, const DistillationRule& rule, double scale, const at::Tensor& grad,
                  double* losses) {
  if (rows.student.scalar_type() == at::kDouble) {
    run_double(rows, rule, scale, grad, losses);
  } else {
    run_float(rows, rule, scale, grad, losses);
  }
}

}  // namespace rarefy::ops
