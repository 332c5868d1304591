// DistillationLoss as a function of its options: what the modules of both languages compute.
#pragma once

#include <rarefy/distillation/loss.h>
#include <torch/types.h>

namespace rarefy::distillation {

/// As DistillationLossImpl::forward; undefined tensors are not given. In Python it is torch.ops.rarefy.distillation_logit_loss,
/// which is made of differentiable operators.
torch::Tensor loss_forward(const torch::Tensor& student_logits, torch::TensorList teacher_logits,
                           const torch::Tensor& labels, const torch::Tensor& row_weights, const torch::Tensor& mask,
                           const DistillationLossOptions& options);

}  // namespace rarefy::distillation
