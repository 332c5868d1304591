#include <ATen/ops/empty.h>
#include <rarefy/ops/mask.h>
#include <torch/library.h>

#include "ops/mask_checks.h"

namespace rarefy::ops {
namespace {

std::vector<at::Tensor> magnitude_mask_meta(at::TensorList weights, double sparsity,
                                            std::optional<at::TensorList> masks) {
  check_magnitude_mask(weights, sparsity, masks);
  std::vector<at::Tensor> out;
  for (const auto& weight : weights) {
    out.push_back(at::empty_symint({mask_bytes(weight.sym_numel())}, weight.options().dtype(at::kByte)));
  }
  return out;
}

void apply_mask_meta(at::Tensor& x, const at::Tensor& mask) { check_apply_mask(x, mask); }

}  // namespace

TORCH_LIBRARY_IMPL(rarefy, Meta, m) {
  m.impl("magnitude_mask", &magnitude_mask_meta);
  m.impl("apply_mask_", &apply_mask_meta);
}

}  // namespace rarefy::ops
