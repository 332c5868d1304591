#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <torch/library.h>

#include "ops/compact_logits_checks.h"

namespace rarefy::ops {
namespace {

at::Tensor compact_logits_meta(const at::Tensor& logits, const at::Tensor& indices, double temperature) {
  check_compact_logits(logits, indices, temperature);
  auto sizes = logits.sym_sizes().vec();
  sizes.back() = indices.sym_size(-1) + 1;
  return at::empty_symint(sizes, logits.options().dtype(loss_type(logits)));
}

at::Tensor compact_logits_backward_meta(const at::Tensor&, const at::Tensor& logits, const at::Tensor&,
                                        const at::Tensor&, double) {
  return at::empty_like(logits, at::MemoryFormat::Contiguous);
}

}  // namespace

TORCH_LIBRARY_IMPL(rarefy, Meta, m) {
  m.impl("compact_logits", &compact_logits_meta);
  m.impl("compact_logits_backward", &compact_logits_backward_meta);
}

}  // namespace rarefy::ops
