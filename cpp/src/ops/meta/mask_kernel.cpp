#include <ATen/ops/empty.h>
#include <rarefy/ops/mask.h>
#include <torch/library.h>

#include "ops/mask_checks.h"

namespace rarefy::ops {
namespace {

at::Tensor empty_mask(const at::Tensor& x) {
  return at::empty_symint({mask_bytes(x.sym_numel())}, x.options().dtype(at::kByte));
}

std::vector<at::Tensor> empty_masks(at::TensorList tensors) {
  std::vector<at::Tensor> out;
  for (const auto& tensor : tensors) {
    out.push_back(empty_mask(tensor));
  }
  return out;
}

std::vector<at::Tensor> magnitude_mask_meta(at::TensorList weights, double sparsity,
                                            std::optional<at::TensorList> masks) {
  check_magnitude_mask("magnitude_mask", "weight", weights, sparsity, masks);
  return empty_masks(weights);
}

std::vector<at::Tensor> score_mask_meta(at::TensorList scores, double sparsity, std::optional<at::TensorList> masks) {
  check_magnitude_mask("score_mask", "score", scores, sparsity, masks);
  return empty_masks(scores);
}

at::Tensor nm_mask_meta(const at::Tensor& x, int64_t n, int64_t m, int64_t dim, const std::optional<at::Tensor>& mask,
                        bool) {
  check_nm_mask(x, n, m, dim, mask);
  return empty_mask(x);
}

at::Tensor pack_mask_meta(const at::Tensor& kept) {
  TORCH_CHECK_TYPE(kept.scalar_type() == at::kBool, "[pack_mask] kept must be bool, got ", kept.scalar_type());
  return empty_mask(kept);
}

at::Tensor unpack_mask_meta(const at::Tensor& mask, c10::SymIntArrayRef size) {
  check_unpack_mask(mask, size);
  return at::empty_symint(size, mask.options().dtype(at::kBool));
}

void apply_mask_meta(at::Tensor& x, const at::Tensor& mask) { check_apply_mask(x, mask); }

}  // namespace

TORCH_LIBRARY_IMPL(rarefy, Meta, m) {
  m.impl("magnitude_mask", &magnitude_mask_meta);
  m.impl("score_mask", &score_mask_meta);
  m.impl("nm_mask", &nm_mask_meta);
  m.impl("pack_mask", &pack_mask_meta);
  m.impl("unpack_mask", &unpack_mask_meta);
  m.impl("apply_mask_", &apply_mask_meta);
}

}  // namespace rarefy::ops
