#pragma once

#include <ATen/core/Tensor.h>
#include <rarefy/export.h>

namespace rarefy::ops {

/// The logits of k + 1 outcomes: k chosen classes, and "any other class", [..., k + 1]:
///
///   out[..., j] = logits[..., indices[..., j]]  for j < k        out[..., k] = T * logsumexp over the other classes of logits / T
///
/// softmax(out / T) are the probabilities of these outcomes under softmax(logits / T). Also torch.ops.rarefy.compact_logits.
///   logits       [..., classes], float32, float64, bfloat16 or float16. Differentiable once in them.
///   indices      int64 [..., k], 1 <= k <= classes, in [0, classes) and different within a row.
///   temperature  T > 0
/// The result is float32 (float64 for float64): the sum of many small probabilities needs it. With k = classes, or where the
/// others are all -inf, the last outcome is -inf.
/// Saves the logits, which the caller holds anyway, and k + 1 numbers per row. A wrong shape or value throws c10::ValueError,
/// a wrong dtype c10::TypeError, an index out of range c10::IndexError. Indices are looked at on the CPU only: on CUDA
/// torch's gather asserts their range, and equal ones in a row give a wrong result.
RAREFY_API at::Tensor compact_logits(const at::Tensor& logits, const at::Tensor& indices, double temperature);

/// The gradient in logits: grad[..., j] at indices[..., j], and grad[..., k] * softmax(others / T) at the others, which is 0
/// where grad[..., k] is 0 whatever the row holds.
/// `compact` is compact_logits' result.
RAREFY_API at::Tensor compact_logits_backward(const at::Tensor& grad, const at::Tensor& logits,
                                              const at::Tensor& indices, const at::Tensor& compact, double temperature);

}  // namespace rarefy::ops
