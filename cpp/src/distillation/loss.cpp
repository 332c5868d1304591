#include <rarefy/distillation/loss.h>
#include <rarefy/ops/distillation_loss.h>

#include "ops/distillation_loss_checks.h"

namespace rarefy::distillation {

void DistillationLossOptions::validate() const {
  ops::check_temperature("DistillationLoss", temperature);
  ops::check_alpha("DistillationLoss", alpha);
}

DistillationLossImpl::DistillationLossImpl(const DistillationLossOptions& options) : options_(options) {
  options_.validate();
}

void DistillationLossImpl::reset() {}  // no parameters and no buffers

torch::Tensor DistillationLossImpl::forward(const torch::Tensor& student_logits, const torch::Tensor& teacher_logits,
                                            const torch::Tensor& labels) {
  const auto given = labels.defined() ? std::optional<at::Tensor>(labels) : std::nullopt;
  return ops::distillation_loss(student_logits, teacher_logits, given, options_.temperature, options_.alpha,
                                options_.ignore_index);
}

void DistillationLossImpl::pretty_print(std::ostream& stream) const {
  stream << "rarefy::distillation::DistillationLoss(temperature=" << options_.temperature
         << ", alpha=" << options_.alpha << ", ignore_index=" << options_.ignore_index << ")";
}

}  // namespace rarefy::distillation
