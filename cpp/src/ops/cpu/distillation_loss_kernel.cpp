#include <ATen/Parallel.h>
#include <ATen/ops/div.h>
#include <ATen/ops/scalar_tensor.h>
#include <rarefy/ops/distillation_loss.h>
#include <torch/library.h>

#include <algorithm>
#include <vector>

#include "ops/allocate.h"
#include "ops/cpu/distillation_loss_simd.h"
#include "ops/cpu/distillation_rows.h"

namespace rarefy::ops {
namespace {

constexpr int64_t kGrain = 16384;  // elements below which a second thread does not pay

struct Results {
  at::Tensor loss;
  at::Tensor grad;     // undefined unless it was asked for
  double scale = 1.0;  // what grad still lacks
};

/// The losses as the reduction has them.
at::Tensor reduce(const std::vector<double>& losses, const DistillationRows& rows, const DistillationRule& rule) {
  const auto type = loss_type(rows.student);
  if (rule.reduction == Reduction::none) {
    const auto sizes = rows.student.sizes().slice(0, static_cast<size_t>(rows.student.dim()) - 1);
    auto loss = empty_cached(sizes, at::kDouble);
    std::copy(losses.begin(), losses.end(), loss.data_ptr<double>());
    return loss.to(type);
  }
  double total = 0.0;
  for (const double loss : losses) {
    total += loss;
  }
  return at::scalar_tensor(rule.reduction == Reduction::mean ? total / rows.total_weight : total, at::dtype(type));
}

/// Divides the weights by the largest of a valid row, so that the gradient of the sum over rows does not depend on their size.
void normalize_weights(DistillationRows& rows, const DistillationRule& rule) {
  double largest = 0.0;
  for (int64_t row = 0; row < rows.count; ++row) {
    largest = rows.is_valid(row, rule) ? std::max(largest, rows.weight(row)) : largest;
  }
  if (rows.weights.defined() && largest > 0.0) {
    rows.weights = rows.weights / largest;  // a copy: they may be the caller's
    rows.total_weight /= largest;
  }
}

Results run(const at::Tensor& student_logits, const at::Tensor& teacher_logits, const std::optional<at::Tensor>& labels,
            const std::optional<at::Tensor>& row_weights, const DistillationLossSettings& settings,
            bool with_gradient) {
  const auto rule = resolve("distillation_loss", settings);
  DistillationRows rows(student_logits, teacher_logits, labels, row_weights, rule);
  const bool mean = rule.reduction == Reduction::mean;
  TORCH_CHECK_VALUE(!mean || rows.total_weight > 0.0,
                    "[distillation_loss] at least one row must be valid (label other than ignore_index ",
                    rule.ignore_index, ", weight above 0), got ", rows.count, " rows, all ignored");
  const bool deferred = mean && rows.student.scalar_type() == at::kHalf;
  if (deferred) {
    normalize_weights(rows, rule);
  }
  const double scale = mean ? 1.0 / rows.total_weight : 1.0;
  Results results;
  if (with_gradient) {
    results.grad = empty_for(rows.student);
    results.scale = deferred ? scale : 1.0;
  }
  std::vector<double> losses(static_cast<size_t>(rows.count));
  distill_rows(rows, rule, deferred ? 1.0 : scale, results.grad, losses.data());
  results.loss = reduce(losses, rows, rule);
  return results;
}

at::Tensor distillation_loss_cpu(const at::Tensor& student_logits, const at::Tensor& teacher_logits,
                                 const std::optional<at::Tensor>& labels, const std::optional<at::Tensor>& row_weights,
                                 const DistillationLossSettings& settings) {
  return run(student_logits, teacher_logits, labels, row_weights, settings, false).loss;
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> distillation_loss_forward_cpu(
    const at::Tensor& student_logits, const at::Tensor& teacher_logits, const std::optional<at::Tensor>& labels,
    const std::optional<at::Tensor>& row_weights, const DistillationLossSettings& settings) {
  auto results = run(student_logits, teacher_logits, labels, row_weights, settings, true);
  return {results.loss, results.grad, at::scalar_tensor(results.scale, results.loss.options())};
}

/// out = factor * grad for elements [begin, end).
void scale_elements(const at::Tensor& grad, const at::Tensor& out, double factor, int64_t begin, int64_t end) {
  if (grad.scalar_type() == at::kDouble) {
    const double* g = grad.const_data_ptr<double>();
    double* y = out.data_ptr<double>();
    for (int64_t i = begin; i < end; ++i) {
      y[i] = g[i] * factor;
    }
    return;
  }
  const auto type = grad.scalar_type() == at::kBFloat16 ? cpu::FloatType::bf16
                    : grad.scalar_type() == at::kHalf   ? cpu::FloatType::f16
                                                        : cpu::FloatType::f32;
  RAREFY_ISA_CALL(scale_gradient, grad.const_data_ptr(), out.data_ptr(), type, static_cast<float>(factor), begin, end);
}

at::Tensor distillation_loss_backward_cpu(const at::Tensor& grad, const at::Tensor& scale, const at::Tensor& upstream) {
  const auto in = grad.contiguous();
  auto out = empty_for(in);
  const double common = scale.item().toDouble();
  if (upstream.dim() == 0) {
    const double factor = common * upstream.item().toDouble();
    at::parallel_for(0, in.numel(), kGrain,
                     [&](int64_t begin, int64_t end) { scale_elements(in, out, factor, begin, end); });
    return out;
  }
  const auto rows = in.sizes().slice(0, static_cast<size_t>(in.dim()) - 1);
  TORCH_CHECK_VALUE(upstream.sizes() == rows, "[distillation_loss_backward] upstream must be a scalar or have shape ",
                    rows, ", got ", upstream.sizes());
  const auto factors = upstream.to(at::kDouble).contiguous();
  const double* factor = factors.const_data_ptr<double>();
  const int64_t n = in.size(-1);
  at::parallel_for(0, upstream.numel(), std::max<int64_t>(1, kGrain / n), [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      scale_elements(in, out, common * factor[row], row * n, (row + 1) * n);
    }
  });
  return out;
}

}  // namespace

TORCH_LIBRARY_IMPL(rarefy, CPU, m) {
  m.impl("distillation_loss", &with_settings<&distillation_loss_cpu>);
  m.impl("distillation_loss_forward", &with_settings<&distillation_loss_forward_cpu>);
  m.impl("distillation_loss_backward", &distillation_loss_backward_cpu);
}

}  // namespace rarefy::ops
