#pragma once

#include <rarefy/export.h>
#include <rarefy/ops/distillation_loss.h>
#include <torch/nn/cloneable.h>
#include <torch/nn/pimpl.h>
#include <torch/types.h>

#include <cstdint>
#include <ostream>
#include <string>
#include <vector>

namespace rarefy::distillation {

/// What the loss computes; the first seven fields are those of ops::DistillationLossSettings.
struct RAREFY_API DistillationLossOptions {
  double temperature = 4.0;  // T > 0, of both softmaxes
  double alpha = 0.5;        // weight of the soft targets, in [0, 1]; the labels have 1 - alpha
  std::string divergence =
      "kl";           // "kl", "reverse_kl", "jensen_shannon", "total_variation", "skewed_kl", "skewed_reverse_kl"
  double skew = 0.5;  // of the last two and of "jensen_shannon", in [0, 1]
  double label_smoothing = 0.0;    // in [0, 1]
  int64_t ignore_index = -100;     // rows with this label add nothing
  std::string reduction = "mean";  // "mean", "sum" or "none"
  /// Where student and teacher do not have the same classes: "error"; "truncate" to the classes that both have, in both
  /// terms; "pad" the shorter with -inf; "map" student classes to teacher classes.
  std::string vocabulary = "error";
  torch::Tensor label_map = {};  // int64 [student classes]: the teacher's class, or -1 for none; with "map" only
  bool shift = false;            // position i is compared with the label, weight and mask of i + 1 (causal models)
  bool standardize = false;      // z-scores of the logits take their place in the divergence
  std::vector<double> teacher_weights = {};  // positive, one per teacher, relative to their sum; empty: all alike

  /// The part that the operator takes.
  ops::DistillationLossSettings settings() const;
  /// Throws c10::ValueError (c10::TypeError for a label_map that is not int64) for a field out of range.
  void validate() const;
};

/// alpha * T^2 * D(softmax(teacher / T), softmax(student / T)) + (1 - alpha) * cross_entropy(student, labels), averaged over
/// the rows whose label is not ignore_index (Hinton et al., 2015, arXiv:1503.02531); D and its options are those of
/// rarefy/ops/distillation_loss.h.
///
/// Several teachers are one with the probabilities sum_k w_k softmax(teacher_k / T). With `standardize` (Sun et al., 2024,
/// arXiv:2403.01427) logits x become (x - mean) / sqrt(variance + 1e-5) over their own classes in D, and not in the
/// cross-entropy: the student need not have the teacher's scale. Logits have to be finite there.
class RAREFY_API DistillationLossImpl : public torch::nn::Cloneable<DistillationLossImpl> {
 public:
  /// Throws as DistillationLossOptions::validate does.
  explicit DistillationLossImpl(const DistillationLossOptions& options = {});

  /// Logits [..., classes], int64 labels [...], row_weights [...] and mask [...] (bool, true where a row counts) to a scalar,
  /// or to [...] for reduction "none" ([..., length - 1] with `shift`). Labels may be undefined when alpha is 1, weights and
  /// mask always. The teacher is cast to the student's dtype, or both to float32 beside a 16-bit one of another kind; no
  /// gradient flows to it. Throws as ops::distillation_loss does.
  torch::Tensor forward(const torch::Tensor& student_logits, const torch::Tensor& teacher_logits,
                        const torch::Tensor& labels = {}, const torch::Tensor& row_weights = {},
                        const torch::Tensor& mask = {});
  /// The same with several teachers. Not an overload: those of forward would take the holder's operator() away.
  torch::Tensor forward_teachers(const torch::Tensor& student_logits, const std::vector<torch::Tensor>& teacher_logits,
                                 const torch::Tensor& labels = {}, const torch::Tensor& row_weights = {},
                                 const torch::Tensor& mask = {});

  const DistillationLossOptions& options() const { return options_; }
  void reset() override;
  void pretty_print(std::ostream& stream) const override;

 private:
  DistillationLossOptions options_;
};
TORCH_MODULE(DistillationLoss);

}  // namespace rarefy::distillation
