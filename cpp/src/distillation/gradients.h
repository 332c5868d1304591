// What the trainer does with gradients between backward() and the optimizer's step.
#pragma once

#include <torch/types.h>

#include <functional>
#include <vector>

namespace rarefy::distillation {

/// The gradients that there are.
std::vector<torch::Tensor> gradients_of(const std::vector<torch::Tensor>& parameters);

/// Divides the gradients by `scale` in place; false when one of them is not finite.
bool unscale(const std::vector<torch::Tensor>& gradients, double scale);

/// Scales the gradients down in place so that their 2-norm is at most max_norm; the norm before that. The operators and
/// their order are those of torch.nn.utils.clip_grad_norm_, to the bit. Gradients stay when the norm is not finite.
double clip_norm(const std::vector<torch::Tensor>& gradients, double max_norm);

/// The 2-norm of each scalar's gradient in the parameters that require one; their graphs are kept.
std::vector<double> gradient_norms(const std::vector<torch::Tensor>& scalars,
                                   const std::vector<torch::Tensor>& parameters);

}  // namespace rarefy::distillation
