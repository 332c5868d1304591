#include <ATen/ops/ones.h>
#include <ATen/ops/scalar_tensor.h>
#include <torch/library.h>

#include <cmath>
#include <vector>

#include "ops/allocate.h"
#include "ops/cpu/distillation_rows.h"
#include "ops/cpu/gradient_matmul.h"
#include "ops/linear_distillation_loss_chunks.h"

namespace rarefy::ops {
namespace {

constexpr int64_t kChunkBytes = int64_t{64} << 20;

/// The weights of the rows, 0 where they are not valid, checked.
at::Tensor valid_weights(const LinearDistillationArguments& arguments, const DistillationRule& rule) {
  const auto& hidden = arguments.student.hidden;
  const int64_t count = hidden.numel() / hidden.size(-1), classes = arguments.student.weight.size(0);
  auto weights = arguments.row_weights.has_value()
                     ? arguments.row_weights->reshape({-1}).to(at::kDouble, /*non_blocking=*/false, /*copy=*/true)
                     : at::ones({count}, at::kDouble);
  const auto labels = arguments.labels.has_value() ? arguments.labels->reshape({-1}).contiguous() : at::Tensor();
  auto* weight = weights.data_ptr<double>();
  for (int64_t row = 0; row < count; ++row) {
    TORCH_CHECK_VALUE(weight[row] >= 0.0 && std::isfinite(weight[row]),
                      "[linear_distillation_loss] row_weights must be finite and >= 0, got ", weight[row], " at row ",
                      row);
    if (!labels.defined()) {
      continue;
    }
    const auto label = labels.const_data_ptr<int64_t>()[row];
    if (label == rule.ignore_index) {
      weight[row] = 0.0;
    } else if (weight[row] > 0.0) {
      TORCH_CHECK_INDEX(label >= 0 && label < classes, "[linear_distillation_loss] labels must be in [0, ", classes,
                        ") or ignore_index (", rule.ignore_index, "), got ", label, " at row ", row);
    }
  }
  return weights;
}

LinearDistillationGradients forward(const LinearDistillationArguments& arguments,
                                    const LinearDistillationWants& wants) {
  const auto rule = resolve("linear_distillation_loss", arguments.settings);
  check_linear_distillation_loss(arguments, rule);
  auto weights = valid_weights(arguments, rule);
  const auto type = loss_type(arguments.student.hidden);
  auto scale = at::scalar_tensor(1.0, at::dtype(type));
  if (rule.reduction == Reduction::mean) {
    const auto sum = weights.sum().item<double>();
    TORCH_CHECK_VALUE(sum > 0.0, "[linear_distillation_loss] at least one row must be valid (label other than ",
                      "ignore_index ", rule.ignore_index, ", weight above 0), got ", weights.numel(),
                      " rows, all ignored");
    // float16 cannot hold a gradient averaged over many rows, nor one of weights far from 1.
    if (arguments.student.hidden.scalar_type() == at::kHalf) {
      const auto largest = weights.max().item<double>();
      weights.div_(largest);
      scale.fill_(largest / sum);
    } else {
      weights.div_(sum);
    }
  }
  const auto distill = [&rule](at::Tensor& student, const at::Tensor& teacher, const at::Tensor& labels,
                               const at::Tensor& row_weights, bool gradient) {
    const DistillationRows rows(student, teacher, labels.defined() ? std::optional(labels) : std::nullopt, row_weights,
                                rule);
    std::vector<double> losses(static_cast<size_t>(rows.count));
    distill_rows(rows, rule, 1.0, gradient ? student : at::Tensor(), losses.data());
    double total = 0.0;
    for (const double loss : losses) {
      total += loss;
    }
    return at::scalar_tensor(total, at::kDouble);
  };
  return linear_distillation_in_chunks(arguments, wants, {kChunkBytes, &matmul_transposed, &empty_cached, distill},
                                       weights, scale);
}

at::Tensor loss_alone(const LinearDistillationArguments& arguments) { return forward(arguments, {}).loss; }

}  // namespace

TORCH_LIBRARY_IMPL(rarefy, CPU, m) {
  m.impl("linear_distillation_loss", &with_linear_settings<&loss_alone>);
  m.impl("linear_distillation_loss_forward", &with_linear_settings_forward<&forward>);
}

}  // namespace rarefy::ops
