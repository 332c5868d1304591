#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <torch/library.h>

#include "ops/linear_distillation_loss_chunks.h"

namespace rarefy::ops {
namespace {

LinearDistillationGradients forward_meta(const LinearDistillationArguments& arguments,
                                         const LinearDistillationWants& wants) {
  check_linear_distillation_loss(arguments, resolve("linear_distillation_loss", arguments.settings));
  return empty_gradients(arguments, wants);
}

at::Tensor loss_meta(const LinearDistillationArguments& arguments) { return forward_meta(arguments, {}).loss; }

at::Tensor backward_meta(const at::Tensor& grad, const at::Tensor&, const at::Tensor&, at::ScalarType dtype) {
  return at::empty_like(grad, grad.options().dtype(dtype));
}

}  // namespace

TORCH_LIBRARY_IMPL(rarefy, Meta, m) {
  m.impl("linear_distillation_loss", &with_linear_settings<&loss_meta>);
  m.impl("linear_distillation_loss_forward", &with_linear_settings_forward<&forward_meta>);
  m.impl("linear_distillation_loss_backward", &backward_meta);
}

}  // namespace rarefy::ops
