#include <ATen/ops/empty.h>
#include <rarefy/ops/apply_masks.h>
#include <torch/library.h>

#include "ops/apply_masks_checks.h"

namespace rarefy::ops {
namespace {

void apply_masks_meta(at::TensorList tensors, at::TensorList masks) {
  check_masked_tensors("apply_masks_", tensors, masks);
}

at::Tensor stray_values_meta(at::TensorList tensors, at::TensorList masks) {
  check_masked_tensors("stray_values", tensors, masks);
  return at::empty({static_cast<int64_t>(tensors.size()), 2}, tensors[0].options().dtype(at::kLong));
}

}  // namespace

TORCH_LIBRARY_IMPL(rarefy, Meta, m) {
  m.impl("apply_masks_", &apply_masks_meta);
  m.impl("stray_values", &stray_values_meta);
}

}  // namespace rarefy::ops
