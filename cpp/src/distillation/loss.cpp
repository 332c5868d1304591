#include <rarefy/distillation/loss.h>

#include <cmath>

#include "distillation/loss_forward.h"
#include "distillation/vocabulary.h"
#include "ops/distillation_rule.h"

namespace rarefy::distillation {

ops::DistillationLossSettings DistillationLossOptions::settings() const {
  return {temperature, alpha, divergence, skew, label_smoothing, ignore_index, reduction};
}

void DistillationLossOptions::validate() const {
  ops::resolve("DistillationLoss", settings());
  vocabulary_of(vocabulary, label_map);
  for (const double weight : teacher_weights) {
    TORCH_CHECK_VALUE(std::isfinite(weight) && weight > 0.0,
                      "[DistillationLoss] teacher_weights must be positive and finite, got ", weight);
  }
}

DistillationLossImpl::DistillationLossImpl(const DistillationLossOptions& options) : options_(options) {
  options_.validate();
}

void DistillationLossImpl::reset() {}  // no parameters and no buffers

torch::Tensor DistillationLossImpl::forward(const torch::Tensor& student_logits, const torch::Tensor& teacher_logits,
                                            const torch::Tensor& labels, const torch::Tensor& row_weights,
                                            const torch::Tensor& mask) {
  return loss_forward(student_logits, teacher_logits, labels, row_weights, mask, options_);
}

torch::Tensor DistillationLossImpl::forward(const torch::Tensor& student_logits,
                                            const std::vector<torch::Tensor>& teacher_logits,
                                            const torch::Tensor& labels, const torch::Tensor& row_weights,
                                            const torch::Tensor& mask) {
  return loss_forward(student_logits, teacher_logits, labels, row_weights, mask, options_);
}

void DistillationLossImpl::pretty_print(std::ostream& stream) const {
  const DistillationLossOptions plain;
  stream << "rarefy::distillation::DistillationLoss(temperature=" << options_.temperature
         << ", alpha=" << options_.alpha;
  const auto show = [&stream](const char* name, const auto& value, const auto& usual) {
    if (value != usual) {
      stream << ", " << name << "=" << value;
    }
  };
  show("divergence", options_.divergence, plain.divergence);
  show("skew", options_.skew, plain.skew);
  show("label_smoothing", options_.label_smoothing, plain.label_smoothing);
  show("ignore_index", options_.ignore_index, plain.ignore_index);
  show("reduction", options_.reduction, plain.reduction);
  show("vocabulary", options_.vocabulary, plain.vocabulary);
  show("shift", options_.shift, plain.shift);
  show("standardize", options_.standardize, plain.standardize);
  if (!options_.teacher_weights.empty()) {
    stream << ", teacher_weights=[" << c10::ArrayRef<double>(options_.teacher_weights) << "]";
  }
  stream << ")";
}

}  // namespace rarefy::distillation
