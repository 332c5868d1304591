#include <ATen/ops/ones.h>
#include <rarefy/distillation/linear_loss.h>

#include <utility>

namespace rarefy::distillation {

LinearDistillationLossImpl::LinearDistillationLossImpl(const DistillationLossOptions& options) : options_(options) {
  options_.validate();
  TORCH_CHECK_VALUE(options_.reduction != "none",
                    "[LinearDistillationLoss] reduction must be 'mean' or 'sum', got 'none'");
}

void LinearDistillationLossImpl::reset() {}  // no parameters and no buffers

torch::Tensor LinearDistillationLossImpl::forward(const ops::LinearHead& student, const ops::LinearHead& teacher,
                                                  const torch::Tensor& labels, const torch::Tensor& row_weights,
                                                  const torch::Tensor& mask) {
  auto weights = row_weights;
  if (mask.defined()) {
    TORCH_CHECK_TYPE(mask.scalar_type() == at::kBool, "[LinearDistillationLoss] mask must be bool, got ",
                     mask.scalar_type());
    TORCH_CHECK_VALUE(student.hidden.dim() >= 1,
                      "[LinearDistillationLoss] student_hidden must have shape [..., student size]");
    const auto rows = student.hidden.sizes().slice(0, static_cast<size_t>(student.hidden.dim()) - 1);
    for (const auto& [name, x] : {std::pair("mask", mask), std::pair("row_weights", row_weights)}) {
      TORCH_CHECK_VALUE(!x.defined() || x.sizes() == rows, "[LinearDistillationLoss] ", name,
                        " must have the shape of student_hidden without its last dimension, ", rows, ", got ",
                        x.sizes());
    }
    weights = (weights.defined() ? weights : at::ones(mask.sizes(), mask.options().dtype(at::kFloat)))
                  .masked_fill(~mask, 0.0);
  }
  const auto given = [](const torch::Tensor& x) { return x.defined() ? std::optional<at::Tensor>(x) : std::nullopt; };
  return ops::linear_distillation_loss(student, teacher, given(labels), given(weights), options_.settings());
}

void LinearDistillationLossImpl::pretty_print(std::ostream& stream) const {
  stream << "rarefy::distillation::LinearDistillationLoss(temperature=" << options_.temperature
         << ", alpha=" << options_.alpha << ", divergence=" << options_.divergence << ")";
}

}  // namespace rarefy::distillation
