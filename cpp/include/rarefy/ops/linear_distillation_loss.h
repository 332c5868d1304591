#pragma once

#include <ATen/core/Tensor.h>
#include <rarefy/export.h>
#include <rarefy/ops/distillation_loss.h>

#include <optional>
#include <tuple>

// distillation_loss of student_hidden @ student_weight^T + student_bias and the same of the teacher, without these logits
// ever being whole: rows are taken in chunks, and a chunk's gradient is written over its logits and multiplied out at once.
// Every function here is also torch.ops.rarefy.<name>. Common to all:
//   student_hidden  [..., student size], float32, float64, bfloat16 or float16
//   student_weight  [classes, student size], student_bias [classes] or none: of the same dtype
//   teacher_hidden, teacher_weight, teacher_bias  the same with a size and a dtype of their own. Constants. A chunk of the
//                   teacher's logits is rounded to the student's dtype.
//   labels, row_weights and settings  as in distillation_loss.h; reduction is "mean" or "sum".
// A wrong shape or value throws c10::ValueError, a wrong dtype c10::TypeError, a label out of range c10::IndexError.
namespace rarefy::ops {

struct RAREFY_API LinearHead {
  at::Tensor hidden;
  at::Tensor weight;
  std::optional<at::Tensor> bias;
};

/// The loss, a scalar in float32 (float64 for float64). Differentiable once, in the student's three tensors. The forward pass
/// computes their gradients and saves nothing else. Beside them it needs two chunks of logits, 64 MiB in all on the CPU (or
/// 16 rows, where those are more), and float32 sums for the gradient of a 16-bit weight.
RAREFY_API at::Tensor linear_distillation_loss(const LinearHead& student, const LinearHead& teacher,
                                               const std::optional<at::Tensor>& labels,
                                               const std::optional<at::Tensor>& row_weights,
                                               const DistillationLossSettings& settings);

struct RAREFY_API LinearDistillationGradients {
  at::Tensor loss;
  at::Tensor hidden;  // student_hidden's shape and dtype
  at::Tensor weight;  // [classes, student size]; for 16-bit dtypes in float32, in which chunks are summed
  at::Tensor bias;    // [classes], the same
  at::Tensor scale;   // scalar of the loss's dtype: the gradients are scale times these. 1 but for the mean in float16
};

/// The loss and those gradients that are asked for; the others have no elements.
RAREFY_API LinearDistillationGradients linear_distillation_loss_forward(
    const LinearHead& student, const LinearHead& teacher, const std::optional<at::Tensor>& labels,
    const std::optional<at::Tensor>& row_weights, const DistillationLossSettings& settings, bool hidden_gradient,
    bool weight_gradient, bool bias_gradient);

/// scale * upstream * grad, rounded to dtype. `upstream`, a scalar, is the gradient of the loss.
RAREFY_API at::Tensor linear_distillation_loss_backward(const at::Tensor& grad, const at::Tensor& scale,
                                                        const at::Tensor& upstream, at::ScalarType dtype);

}  // namespace rarefy::ops
