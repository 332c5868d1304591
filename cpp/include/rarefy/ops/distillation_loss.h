#pragma once

#include <ATen/core/Tensor.h>
#include <rarefy/export.h>

#include <cstdint>
#include <optional>
#include <string>
#include <tuple>

// The distillation loss of Hinton et al. (2015, arXiv:1503.02531), soft targets at a temperature T and hard labels, and its
// family. With p = softmax(teacher / T) and q = softmax(student / T), a row's loss is
//
//   alpha * T^2 * D(p, q) + (1 - alpha) * cross_entropy(student, label; label_smoothing)
//
// where D is a divergence over the classes. T^2 keeps the size of the gradient independent of T. Every function here is also
// torch.ops.rarefy.<name> in Python, with the settings as keyword arguments. Common to all:
//   student_logits  [..., classes], float32, float64, bfloat16 or float16. Computed in float32 (float64 for float64).
//   teacher_logits  the same shape and dtype. A constant: no gradient flows to it.
//   labels          int64 [...], classes in [0, classes). A row whose label is ignore_index is not valid: it adds nothing
//                   to either term, and its gradient is 0. Without labels alpha must be 1.
//   row_weights     [...], floating point, finite and >= 0; 1 when not given. A row of weight 0 is not valid.
//                   Must not require a gradient.
// Everything goes through log-sum-exp: logits of 1e4 are fine. A class of probability 0 (a logit of -inf) adds nothing where
// it is 0 in the distribution that D averages over; docs/dev/numerics.md says where D is +inf. NaN gives NaN. What a row that
// is not valid holds does not matter.
// A wrong shape or value throws c10::ValueError, a wrong dtype c10::TypeError, a label out of range c10::IndexError. On CUDA
// values are not read back: no valid row to average over, a label out of range or a negative weight gives NaN.
namespace rarefy::ops {

struct RAREFY_API DistillationLossSettings {
  double temperature = 4.0;  // T, in [1e-6, 1e6]
  double alpha = 0.5;        // the weight of the soft targets, in [0, 1]
  /// "kl"                   KL(p || q) = sum p log(p / q)
  /// "reverse_kl"           KL(q || p)
  /// "jensen_shannon"       skew KL(p || m) + (1 - skew) KL(q || m), m = skew p + (1 - skew) q; skew 0 means KL(p || q) and 1
  ///                        KL(q || p), its limits up to scale (generalised: Agarwal et al., 2024, arXiv:2306.13649)
  /// "total_variation"      sum |p - q| / 2
  /// "skewed_kl"            KL(p || skew p + (1 - skew) q) (Ko et al., 2024, arXiv:2402.03898)
  /// "skewed_reverse_kl"    KL(q || skew q + (1 - skew) p) (the same)
  std::string divergence = "kl";
  double skew = 0.5;             // in [0, 1], and below 1 for the skewed ones; the other divergences do not use it
  double label_smoothing = 0.0;  // the part of a label's mass that is spread evenly over all classes, in [0, 1]
  int64_t ignore_index = -100;   // rows with this label are not valid
  /// With w the weights of the valid rows: "mean": sum w loss / sum w; "sum": sum w loss; "none": w loss of each row, [...].
  std::string reduction = "mean";
};

/// The loss, in float32 (float64 for float64): a scalar, or [...] for reduction "none". Differentiable once, in
/// student_logits. The forward pass computes the gradient too while a row is in cache, and saves nothing else. Sums rows in
/// order, in double, so the result does not depend on the number of threads.
RAREFY_API at::Tensor distillation_loss(const at::Tensor& student_logits, const at::Tensor& teacher_logits,
                                        const std::optional<at::Tensor>& labels,
                                        const std::optional<at::Tensor>& row_weights,
                                        const DistillationLossSettings& settings);

/// The loss, and what the backward pass needs: (loss, grad, scale), where scale * grad is the gradient in student_logits of
/// the loss (of the sum of its rows, for reduction "none"). grad has their shape and dtype, contiguous; scale is a scalar of
/// the loss's dtype. It is 1 but for the mean in float16, whose range cannot hold a gradient averaged over many rows: there
/// grad is of the sum over rows and scale is 1 / (sum of weights), so that a loss scaler works.
RAREFY_API std::tuple<at::Tensor, at::Tensor, at::Tensor> distillation_loss_forward(
    const at::Tensor& student_logits, const at::Tensor& teacher_logits, const std::optional<at::Tensor>& labels,
    const std::optional<at::Tensor>& row_weights, const DistillationLossSettings& settings);

/// scale * upstream * grad in grad's dtype, the factors multiplied first. `upstream` is the gradient of the loss: a scalar,
/// or one number for each row of grad.
RAREFY_API at::Tensor distillation_loss_backward(const at::Tensor& grad, const at::Tensor& scale,
                                                 const at::Tensor& upstream);

}  // namespace rarefy::ops
