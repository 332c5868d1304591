#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <rarefy/ops/relu.h>
#include <torch/library.h>

#include "ops/fake_quantize_checks.h"

namespace rarefy::ops {
namespace {

at::Tensor relu_mask_inplace_meta(at::Tensor& x) {
  check_float("relu_", x, "input");
  return at::empty_symint({mask_bytes(x.sym_numel())}, x.options().dtype(at::kByte));
}

std::tuple<at::Tensor, at::Tensor> relu_mask_meta(const at::Tensor& x) {
  check_float("relu", x, "input");
  auto out = at::empty_like(x);
  return {out, relu_mask_inplace_meta(out)};
}

}  // namespace

TORCH_LIBRARY_IMPL(rarefy, Meta, m) {
  m.impl("relu_mask", &relu_mask_meta);
  m.impl("relu_mask_", &relu_mask_inplace_meta);
}

}  // namespace rarefy::ops
