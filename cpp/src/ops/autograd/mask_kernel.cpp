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

std::vector<at::Tensor> score_mask_autograd(at::TensorList scores, double sparsity,
                                            std::optional<at::TensorList> masks) {
  at::AutoDispatchBelowADInplaceOrView guard;
  return score_mask(scores, sparsity, masks);
}

at::Tensor nm_mask_autograd(const at::Tensor& x, int64_t n, int64_t m, int64_t dim,
                            const std::optional<at::Tensor>& mask, bool magnitude) {
  at::AutoDispatchBelowADInplaceOrView guard;
  return nm_mask(x, n, m, dim, mask, magnitude);
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
  m.impl("score_mask", &score_mask_autograd);
  m.impl("nm_mask", &nm_mask_autograd);
  m.impl("apply_mask_", &apply_mask_autograd);
}

}  // namespace rarefy::ops
