#include <rarefy/distillation/loss.h>
#include <rarefy/ops/distillation_loss.h>

#include "ops/distillation_rule.h"

namespace rarefy::distillation {

ops::DistillationLossSettings DistillationLossOptions::settings() const {
  return {temperature, alpha, divergence, skew, label_smoothing, ignore_index, reduction};
}

void DistillationLossOptions::validate() const { ops::resolve("DistillationLoss", settings()); }

DistillationLossImpl::DistillationLossImpl(const DistillationLossOptions& options) : options_(options) {
  options_.validate();
}

void DistillationLossImpl::reset() {}  // no parameters and no buffers

torch::Tensor DistillationLossImpl::forward(const torch::Tensor& student_logits, const torch::Tensor& teacher_logits,
                                            const torch::Tensor& labels, const torch::Tensor& row_weights) {
  const auto given = [](const torch::Tensor& x) { return x.defined() ? std::optional<at::Tensor>(x) : std::nullopt; };
  return ops::distillation_loss(student_logits, teacher_logits, given(labels), given(row_weights), options_.settings());
}

void DistillationLossImpl::pretty_print(std::ostream& stream) const {
  stream << "rarefy::distillation::DistillationLoss(temperature=" << options_.temperature
         << ", alpha=" << options_.alpha << ", ignore_index=" << options_.ignore_index << ")";
}

}  // namespace rarefy::distillation
