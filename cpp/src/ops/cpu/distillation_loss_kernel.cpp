#include <ATen/Parallel.h>
#include <ATen/ops/scalar_tensor.h>
#include <rarefy/ops/distillation_loss.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <memory>
#include <vector>

#include "ops/allocate.h"
#include "ops/cpu/distillation_loss_simd.h"
#include "ops/distillation_loss_checks.h"

namespace rarefy::ops {
namespace {

constexpr int64_t kGrain = 16384;  // elements below which a second thread does not pay

cpu::FloatType float_type(const at::Tensor& x) {
  return x.scalar_type() == at::kBFloat16 ? cpu::FloatType::bf16
         : x.scalar_type() == at::kHalf   ? cpu::FloatType::f16
                                          : cpu::FloatType::f32;
}

/// The arguments as dense rows, checked.
struct Problem {
  at::Tensor student;
  at::Tensor teacher;
  at::Tensor labels;  // undefined when there are none
  double temperature;
  double alpha;
  int64_t ignore_index;
  int64_t classes;
  int64_t rows;
  int64_t valid_rows;

  Problem(const at::Tensor& student_logits, const at::Tensor& teacher_logits, const std::optional<at::Tensor>& given,
          double t, double a, int64_t ignored)
      : temperature(t), alpha(a), ignore_index(ignored) {
    check_distillation_loss(student_logits, teacher_logits, given, temperature, alpha);
    student = student_logits.contiguous();
    teacher = teacher_logits.contiguous();
    classes = student.size(-1);
    rows = student.numel() / classes;
    valid_rows = rows;
    if (given.has_value()) {
      labels = given->contiguous();
      valid_rows = count_valid();
      TORCH_CHECK_VALUE(valid_rows > 0,
                        "[distillation_loss] at least one row must be valid (label other than ignore_index ",
                        ignore_index, "), got ", rows, " rows, all ignored");
    }
  }

  bool has_labels() const { return labels.defined(); }
  int64_t label(int64_t row) const { return labels.const_data_ptr<int64_t>()[row]; }
  bool is_valid(int64_t row) const { return !has_labels() || label(row) != ignore_index; }
  bool soft() const { return alpha > 0.0; }
  bool hard() const { return alpha < 1.0; }

 private:
  int64_t count_valid() const {
    int64_t count = 0;
    for (int64_t row = 0; row < rows; ++row) {
      if (is_valid(row)) {
        TORCH_CHECK_INDEX(label(row) >= 0 && label(row) < classes, "[distillation_loss] labels must be in [0, ",
                          classes, ") or ignore_index (", ignore_index, "), got ", label(row), " at row ", row);
        ++count;
      }
    }
    return count;
  }
};

/// k when temperature is 2^k and squaring k times costs less accuracy than it is worth; -1 otherwise.
int squarings_of(double temperature) {
  // Each squaring doubles the relative error: 8 ulp of an exponential at T = 8.
  return temperature == 1.0 ? 0 : temperature == 2.0 ? 1 : temperature == 4.0 ? 2 : temperature == 8.0 ? 3 : -1;
}

/// The loss of one row from its sums.
double row_loss(const Problem& problem, const cpu::DistillationSums& sums) {
  double loss = 0.0;
  if (problem.soft()) {
    // log p - log q = ((t - m_t) - (s - m_s)) / T - log sum_t + log sum_s, weighted by p. Rounding may leave it below 0.
    const double kl = sums.cross / (problem.temperature * sums.soft_teacher) - std::log(sums.soft_teacher) +
                      std::log(sums.soft_student);
    loss += problem.alpha * problem.temperature * problem.temperature * (kl < 0.0 ? 0.0 : kl);
  }
  if (problem.hard()) {
    const double logsumexp = static_cast<double>(sums.student_max) + std::log(sums.hard_student);
    loss += (1.0 - problem.alpha) * (logsumexp - static_cast<double>(sums.label_logit));
  }
  return loss;
}

void run_float(const Problem& problem, double scale, const at::Tensor& grad, double* losses) {
  const cpu::DistillationTask task{float_type(problem.student),
                                   problem.classes,
                                   problem.soft(),
                                   problem.hard(),
                                   squarings_of(problem.temperature),
                                   static_cast<float>(1.4426950408889634 / problem.temperature),
                                   problem.alpha * problem.temperature * scale,
                                   (1.0 - problem.alpha) * scale};
  const auto* student = static_cast<const char*>(problem.student.const_data_ptr());
  const auto* teacher = static_cast<const char*>(problem.teacher.const_data_ptr());
  auto* out = grad.defined() ? static_cast<char*>(grad.data_ptr()) : nullptr;
  const auto row_bytes = problem.classes * static_cast<int64_t>(problem.student.element_size());
  at::parallel_for(0, problem.rows, std::max<int64_t>(1, kGrain / problem.classes), [&](int64_t begin, int64_t end) {
    const auto scratch = std::unique_ptr<float[]>(
        out == nullptr ? nullptr : new float[static_cast<size_t>(cpu::distillation_scratch(problem.classes))]);
    for (int64_t row = begin; row < end; ++row) {
      char* row_grad = out == nullptr ? nullptr : out + row * row_bytes;
      if (!problem.is_valid(row)) {
        losses[row] = 0.0;
        if (row_grad != nullptr) {
          std::fill_n(row_grad, row_bytes, char{0});
        }
        continue;
      }
      const cpu::DistillationRow arguments{student + row * row_bytes, teacher + row * row_bytes, row_grad,
                                           scratch.get(), problem.hard() ? problem.label(row) : 0};
      losses[row] = row_loss(problem, RAREFY_ISA_CALL(distill_row, task, arguments));
    }
  });
}

/// The same formulas in float64, plain: for gradient checks and reference runs, where speed is not the point.
void run_double(const Problem& problem, double scale, const at::Tensor& grad, double* losses) {
  const int64_t n = problem.classes;
  const double t = problem.temperature;
  const double* students = problem.student.const_data_ptr<double>();
  const double* teachers = problem.teacher.const_data_ptr<double>();
  double* out = grad.defined() ? grad.data_ptr<double>() : nullptr;
  at::parallel_for(0, problem.rows, std::max<int64_t>(1, kGrain / n), [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      const double* student = students + row * n;
      const double* teacher = teachers + row * n;
      losses[row] = 0.0;
      if (!problem.is_valid(row)) {
        if (out != nullptr) {
          std::fill_n(out + row * n, n, 0.0);
        }
        continue;
      }
      // log softmax(x / t) = (x - max) / t - log_sum
      const auto log_sum = [n](const double* x, double max, double at_temperature) {
        double sum = 0.0;
        for (int64_t i = 0; i < n; ++i) {
          sum += std::exp((x[i] - max) / at_temperature);
        }
        return std::log(sum);
      };
      const double max_s = *std::max_element(student, student + n);
      const double max_t = *std::max_element(teacher, teacher + n);
      const double soft_s = problem.soft() ? log_sum(student, max_s, t) : 0.0;
      const double soft_t = problem.soft() ? log_sum(teacher, max_t, t) : 0.0;
      const double hard_s = problem.hard() ? log_sum(student, max_s, 1.0) : 0.0;
      double kl = 0.0;
      for (int64_t i = 0; i < n; ++i) {
        const double log_q = (student[i] - max_s) / t - soft_s;
        const double log_p = (teacher[i] - max_t) / t - soft_t;
        const double p = std::exp(log_p);
        if (problem.soft() && p != 0.0) {
          kl += p * (log_p - log_q);
        }
        if (out != nullptr) {
          double gradient = 0.0;
          if (problem.soft()) {
            gradient += problem.alpha * t * scale * (std::exp(log_q) - p);
          }
          if (problem.hard()) {
            gradient += (1.0 - problem.alpha) * scale *
                        (std::exp(student[i] - max_s - hard_s) - (i == problem.label(row) ? 1.0 : 0.0));
          }
          out[row * n + i] = gradient;
        }
      }
      if (problem.soft()) {
        losses[row] += problem.alpha * t * t * (kl < 0.0 ? 0.0 : kl);
      }
      if (problem.hard()) {
        losses[row] += (1.0 - problem.alpha) * (max_s + hard_s - student[problem.label(row)]);
      }
    }
  });
}

/// The mean of the rows' losses. Writes scale times the gradient of their sum, unless grad is undefined.
at::Tensor run(const Problem& problem, double scale, const at::Tensor& grad) {
  std::vector<double> losses(static_cast<size_t>(problem.rows));
  if (problem.student.scalar_type() == at::kDouble) {
    run_double(problem, scale, grad, losses.data());
  } else {
    run_float(problem, scale, grad, losses.data());
  }
  double total = 0.0;
  for (const double loss : losses) {
    total += loss;
  }
  return at::scalar_tensor(total / static_cast<double>(problem.valid_rows), at::dtype(loss_type(problem.student)));
}

at::Tensor distillation_loss_cpu(const at::Tensor& student_logits, const at::Tensor& teacher_logits,
                                 const std::optional<at::Tensor>& labels, double temperature, double alpha,
                                 int64_t ignore_index) {
  return run({student_logits, teacher_logits, labels, temperature, alpha, ignore_index}, 0.0, {});
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> distillation_loss_forward_cpu(const at::Tensor& student_logits,
                                                                             const at::Tensor& teacher_logits,
                                                                             const std::optional<at::Tensor>& labels,
                                                                             double temperature, double alpha,
                                                                             int64_t ignore_index) {
  const Problem problem(student_logits, teacher_logits, labels, temperature, alpha, ignore_index);
  const double mean = 1.0 / static_cast<double>(problem.valid_rows);
  const bool deferred = problem.student.scalar_type() == at::kHalf;
  auto grad = empty_for(problem.student);
  auto loss = run(problem, deferred ? 1.0 : mean, grad);
  return {loss, grad, at::scalar_tensor(deferred ? mean : 1.0, loss.options())};
}

at::Tensor distillation_loss_backward_cpu(const at::Tensor& grad, const at::Tensor& scale, const at::Tensor& upstream) {
  const auto in = grad.contiguous();
  auto out = empty_for(in);
  const double factor = scale.item().toDouble() * upstream.item().toDouble();
  if (in.scalar_type() == at::kDouble) {
    const double* g = in.const_data_ptr<double>();
    double* y = out.data_ptr<double>();
    at::parallel_for(0, in.numel(), kGrain, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        y[i] = g[i] * factor;
      }
    });
    return out;
  }
  const void* g = in.const_data_ptr();
  void* y = out.data_ptr();
  const auto type = float_type(in);
  at::parallel_for(0, in.numel(), kGrain, [&](int64_t begin, int64_t end) {
    RAREFY_ISA_CALL(scale_gradient, g, y, type, static_cast<float>(factor), begin, end);
  });
  return out;
}

}  // namespace

TORCH_LIBRARY_IMPL(rarefy, CPU, m) {
  m.impl("distillation_loss", &distillation_loss_cpu);
  m.impl("distillation_loss_forward", &distillation_loss_forward_cpu);
  m.impl("distillation_loss_backward", &distillation_loss_backward_cpu);
}

}  // namespace rarefy::ops
