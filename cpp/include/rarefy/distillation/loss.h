#pragma once

#include <rarefy/export.h>
#include <rarefy/ops/distillation_loss.h>
#include <torch/nn/cloneable.h>
#include <torch/nn/pimpl.h>
#include <torch/types.h>

#include <cstdint>
#include <ostream>
#include <string>

namespace rarefy::distillation {

/// What the loss computes; see rarefy/ops/distillation_loss.h.
struct RAREFY_API DistillationLossOptions {
  double temperature = 4.0;  // T > 0, of both softmaxes
  double alpha = 0.5;        // weight of the soft targets, in [0, 1]; the labels have 1 - alpha
  std::string divergence =
      "kl";           // "kl", "reverse_kl", "jensen_shannon", "total_variation", "skewed_kl", "skewed_reverse_kl"
  double skew = 0.5;  // of the last two and of "jensen_shannon", in [0, 1]
  double label_smoothing = 0.0;    // in [0, 1]
  int64_t ignore_index = -100;     // rows with this label add nothing
  std::string reduction = "mean";  // "mean", "sum" or "none"

  /// The part that the operator takes.
  ops::DistillationLossSettings settings() const;
  /// Throws c10::ValueError for a field out of range.
  void validate() const;
};

/// alpha * T^2 * KL(softmax(teacher / T) || softmax(student / T)) + (1 - alpha) * cross_entropy(student, labels), averaged
/// over the rows whose label is not ignore_index (Hinton et al., 2015, arXiv:1503.02531).
class RAREFY_API DistillationLossImpl : public torch::nn::Cloneable<DistillationLossImpl> {
 public:
  /// Throws c10::ValueError for options out of range.
  explicit DistillationLossImpl(const DistillationLossOptions& options = {});

  /// Logits [..., classes] and int64 labels [...] to a scalar. Labels may be undefined when alpha is 1. No gradient flows to
  /// the teacher. Throws as ops::distillation_loss does.
  torch::Tensor forward(const torch::Tensor& student_logits, const torch::Tensor& teacher_logits,
                        const torch::Tensor& labels = {}, const torch::Tensor& row_weights = {});

  const DistillationLossOptions& options() const { return options_; }
  void reset() override;
  void pretty_print(std::ostream& stream) const override;

 private:
  DistillationLossOptions options_;
};
TORCH_MODULE(DistillationLoss);

}  // namespace rarefy::distillation
