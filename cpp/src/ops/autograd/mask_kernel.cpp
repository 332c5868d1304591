#include <ATen/core/grad_mode.h>
#include <rarefy/ops/mask.h>
#include <torch/library.h>

namespace rarefy::ops {
namespace {

// Masks are integers: nothing flows back through them.
std::vector<at::Tensor> magnitude_mask_autograd(at::TensorList weights, double sparsity,
                                                std::optional<at::TensorList> masks) {
  at::AutoDispatchBelowADInplaceOrView guard;
  return magnitude_mask(weights, sparsity, masks);
}

void apply_mask_autograd(at::Tensor& x, const at::Tensor& mask) {
  TORCH_CHECK_VALUE(
      !(x.requires_grad() && at::GradMode::is_enabled()),
      "[apply_mask_] x must not require grad while gradients are recorded; call it under torch.no_grad()");
  {
    at::AutoDispatchBelowADInplaceOrView guard;
    apply_mask_(x, mask);
  }
  if (!x.is_inference()) {
    x.unsafeGetTensorImpl()
        ->bump_version();  // a graph that saved x must notice, as with torch's own in-place operators
  }
}

}  // namespace

TORCH_LIBRARY_IMPL(rarefy, Autograd, m) {
  m.impl("magnitude_mask", &magnitude_mask_autograd);
  m.impl("apply_mask_", &apply_mask_autograd);
}

}  // namespace rarefy::ops
