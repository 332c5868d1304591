#pragma once

#include <ATen/core/Tensor.h>
#include <rarefy/export.h>

#include <cstdint>
#include <optional>
#include <tuple>

// The distillation loss of Hinton et al. (2015, arXiv:1503.02531): soft targets at a temperature T and hard labels,
//
//   loss = alpha * T^2 * KL(softmax(teacher / T) || softmax(student / T)) + (1 - alpha) * cross_entropy(student, labels)
//
// averaged over the valid rows. KL(p || q) = sum p log(p / q) over the classes; T^2 keeps the size of the gradient
// independent of T. Every function here is also torch.ops.rarefy.<name> in Python. Common to all:
//   student_logits  [..., classes], float32, float64, bfloat16 or float16. Computed in float32 (float64 for float64).
//   teacher_logits  the same shape and dtype. A constant: no gradient flows to it.
//   labels          int64 [...], classes in [0, classes). A row whose label is ignore_index is not valid: it adds nothing
//                   to either term, and its gradient is 0. Without labels alpha must be 1, and every row is valid.
//   temperature     T > 0.        alpha  the weight of the soft targets, in [0, 1].
// Everything goes through log-sum-exp: logits of 1e4 are fine. A class of probability 0 (a logit of -inf) adds nothing to
// the KL term where it is the teacher's; where it is the student's only, the loss is +inf. NaN gives NaN.
// A wrong shape or value throws c10::ValueError (so does a batch without valid rows), a wrong dtype c10::TypeError, a label
// out of range c10::IndexError. On CUDA labels are not read back: no valid row, or a label out of range, gives NaN.
namespace rarefy::ops {

/// The loss, a scalar in float32 (float64 for float64). Differentiable once, in student_logits. The forward pass computes
/// the gradient too while a row is in cache, and saves nothing else. Sums rows in order, in double, so the result does not
/// depend on the number of threads.
RAREFY_API at::Tensor distillation_loss(const at::Tensor& student_logits, const at::Tensor& teacher_logits,
                                        const std::optional<at::Tensor>& labels, double temperature, double alpha,
                                        int64_t ignore_index);

/// The loss, and what the backward pass needs: (loss, grad, scale), where scale * grad is the loss's gradient in
/// student_logits. grad has their shape and dtype, contiguous; scale is a scalar of the loss's dtype. It is 1 but for
/// float16, whose range cannot hold a gradient averaged over many rows: there grad is of the sum over rows and scale is
/// 1 / (valid rows), so that a loss scaler works.
RAREFY_API std::tuple<at::Tensor, at::Tensor, at::Tensor> distillation_loss_forward(
    const at::Tensor& student_logits, const at::Tensor& teacher_logits, const std::optional<at::Tensor>& labels,
    double temperature, double alpha, int64_t ignore_index);

/// scale * upstream * grad in grad's dtype, the factors multiplied first. `upstream` is the gradient of the loss.
RAREFY_API at::Tensor distillation_loss_backward(const at::Tensor& grad, const at::Tensor& scale,
                                                 const at::Tensor& upstream);

}  // namespace rarefy::ops
