#include <ATen/core/grad_mode.h>
#include <rarefy/ops/apply_masks.h>
#include <torch/library.h>

namespace rarefy::ops {
namespace {

void apply_masks_autograd(at::TensorList tensors, at::TensorList masks) {
  for (size_t i = 0; i < tensors.size(); ++i) {
    TORCH_CHECK_VALUE(!(tensors[i].requires_grad() && at::GradMode::is_enabled()),
                      "[apply_masks_] tensors must not require grad while gradients are recorded, got one at ", i,
                      "; call it under torch.no_grad()");
  }
  {
    at::AutoDispatchBelowADInplaceOrView guard;
    apply_masks_(tensors, masks);
  }
  for (const auto& x : tensors) {
    if (!x.is_inference()) {
      x.unsafeGetTensorImpl()->bump_version();  // a graph that saved x must notice
    }
  }
}

at::Tensor stray_values_autograd(at::TensorList tensors, at::TensorList masks) {
  at::AutoDispatchBelowADInplaceOrView guard;
  return stray_values(tensors, masks);
}

}  // namespace

TORCH_LIBRARY_IMPL(rarefy, Autograd, m) {
  m.impl("apply_masks_", &apply_masks_autograd);
  m.impl("stray_values", &stray_values_autograd);
}

}  // namespace rarefy::ops
