// The chunks of linear_distillation_loss, for every device, and its argument rules.
#pragma once

#include <rarefy/ops/linear_distillation_loss.h>

#include <cstdint>
#include <functional>
#include <string>
#include <string_view>
#include <tuple>

#include "ops/distillation_rule.h"

namespace rarefy::ops {

struct LinearDistillationArguments {
  LinearHead student, teacher;
  std::optional<at::Tensor> labels, row_weights;
  DistillationLossSettings settings;
};

/// Which gradients are asked for.
struct LinearDistillationWants {
  bool hidden = false, weight = false, bias = false;
  bool any() const { return hidden || weight || bias; }
};

/// What a device does in its own way.
struct LinearDistillationDevice {
  int64_t chunk_bytes;  // of two chunks of logits
  /// a [M, K] times the transpose of b [N, K].
  std::function<at::Tensor(const at::Tensor& a, const at::Tensor& b)> matmul_transposed;
  /// Uninitialized memory for a result.
  std::function<at::Tensor(at::IntArrayRef sizes, at::ScalarType dtype)> allocate;
  /// The sum over a chunk's rows of weight * loss, float64. With `gradient`, student_logits become its gradient.
  std::function<at::Tensor(at::Tensor& student_logits, const at::Tensor& teacher_logits, const at::Tensor& labels,
                           const at::Tensor& weights, bool gradient)>
      distill;
};

/// Everything that can be checked without reading values.
void check_linear_distillation_loss(const LinearDistillationArguments& arguments, const DistillationRule& rule);

/// Shapes and dtypes of the results, without values.
LinearDistillationGradients empty_gradients(const LinearDistillationArguments& arguments,
                                            const LinearDistillationWants& wants);

/// The loss and the gradients. `weights` are those of the rows, float64 [rows], 0 where a row is not valid, and divided by
/// their sum already where the loss is to be; `scale` is what the gradients still lack.
LinearDistillationGradients linear_distillation_in_chunks(const LinearDistillationArguments& arguments,
                                                          const LinearDistillationWants& wants,
                                                          const LinearDistillationDevice& device,
                                                          const at::Tensor& weights, const at::Tensor& scale);

using LinearDistillationResult = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor>;

/// The dispatcher's argument lists, put together for a kernel.
template <auto kernel>
at::Tensor with_linear_settings(const at::Tensor& student_hidden, const at::Tensor& student_weight,
                                const std::optional<at::Tensor>& student_bias, const at::Tensor& teacher_hidden,
                                const at::Tensor& teacher_weight, const std::optional<at::Tensor>& teacher_bias,
                                const std::optional<at::Tensor>& labels, const std::optional<at::Tensor>& row_weights,
                                double temperature, double alpha, std::string_view divergence, double skew,
                                double label_smoothing, int64_t ignore_index, std::string_view reduction) {
  return kernel(
      {{student_hidden, student_weight, student_bias},
       {teacher_hidden, teacher_weight, teacher_bias},
       labels,
       row_weights,
       {temperature, alpha, std::string(divergence), skew, label_smoothing, ignore_index, std::string(reduction)}});
}

template <auto kernel>
LinearDistillationResult with_linear_settings_forward(
    const at::Tensor& student_hidden, const at::Tensor& student_weight, const std::optional<at::Tensor>& student_bias,
    const at::Tensor& teacher_hidden, const at::Tensor& teacher_weight, const std::optional<at::Tensor>& teacher_bias,
    const std::optional<at::Tensor>& labels, const std::optional<at::Tensor>& row_weights, double temperature,
    double alpha, std::string_view divergence, double skew, double label_smoothing, int64_t ignore_index,
    std::string_view reduction, bool hidden_gradient, bool weight_gradient, bool bias_gradient) {
  auto results = kernel(
      {{student_hidden, student_weight, student_bias},
       {teacher_hidden, teacher_weight, teacher_bias},
       labels,
       row_weights,
       {temperature, alpha, std::string(divergence), skew, label_smoothing, ignore_index, std::string(reduction)}},
      {hidden_gradient, weight_gradient, bias_gradient});
  return {results.loss, results.hidden, results.weight, results.bias, results.scale};
}

}  // namespace rarefy::ops
