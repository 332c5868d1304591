#include <ATen/ops/empty.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/ones.h>
#include <c10/core/DeviceGuard.h>
#include <torch/library.h>

#include <limits>

#include "ops/linear_distillation_loss_chunks.h"

namespace rarefy::ops {
namespace {

constexpr int64_t kChunkBytes = int64_t{512} << 20;

LinearDistillationGradients forward(const LinearDistillationArguments& arguments,
                                    const LinearDistillationWants& wants) {
  const auto rule = resolve("linear_distillation_loss", arguments.settings);
  check_linear_distillation_loss(arguments, rule);
  const auto& hidden = arguments.student.hidden;
  const c10::DeviceGuard guard(hidden.device());
  const auto options = hidden.options();
  // No value is read back: without a valid row the division gives NaN.
  auto weights = arguments.row_weights.has_value()
                     ? arguments.row_weights->reshape({-1}).to(at::kDouble, /*non_blocking=*/false, /*copy=*/true)
                     : at::ones({hidden.numel() / hidden.size(-1)}, options.dtype(at::kDouble));
  if (arguments.labels.has_value()) {
    weights.masked_fill_(arguments.labels->reshape({-1}) == rule.ignore_index, 0.0);
  }
  // Before a division makes a valid weight of two that are not.
  const auto valid = weights.ge(0.0).logical_and_(weights.lt(std::numeric_limits<double>::infinity()));
  weights.masked_fill_(valid.logical_not(), std::numeric_limits<double>::quiet_NaN());
  auto scale = at::ones({}, options.dtype(loss_type(hidden)));
  if (rule.reduction == Reduction::mean) {
    const auto sum = weights.sum();
    if (hidden.scalar_type() == at::kHalf) {
      const auto largest = weights.max();
      weights.div_(largest);
      scale.copy_(largest / sum);
    } else {
      weights.div_(sum);
    }
  }
  auto settings = arguments.settings;
  settings.reduction = "sum";
  const LinearDistillationDevice device{
      kChunkBytes, [](const at::Tensor& a, const at::Tensor& b) { return at::mm(a, b.t()); },
      [&options](at::IntArrayRef sizes, at::ScalarType type) { return at::empty(sizes, options.dtype(type)); },
      [&settings](at::Tensor& student, const at::Tensor& teacher, const at::Tensor& labels,
                  const at::Tensor& row_weights, bool gradient) {
        const auto given = labels.defined() ? std::optional(labels) : std::nullopt;
        if (!gradient) {
          return distillation_loss(student, teacher, given, row_weights, settings).to(at::kDouble);
        }
        auto [loss, grad, one] = distillation_loss_forward(student, teacher, given, row_weights, settings);
        student = grad;
        return loss.to(at::kDouble);
      }};
  return linear_distillation_in_chunks(arguments, wants, device, weights, scale);
}

at::Tensor loss_alone(const LinearDistillationArguments& arguments) { return forward(arguments, {}).loss; }

}  // namespace

TORCH_LIBRARY_IMPL(rarefy, CUDA, m) {
  m.impl("linear_distillation_loss", &with_linear_settings<&loss_alone>);
  m.impl("linear_distillation_loss_forward", &with_linear_settings_forward<&forward>);
}

}  // namespace rarefy::ops
