#include <ATen/ops/empty.h>
#include <torch/library.h>

#include "ops/sparse_linear_checks.h"

namespace rarefy::ops {
namespace {

at::Tensor sparse_linear_meta(const at::Tensor& x, const at::Tensor& values, const at::Tensor& columns,
                              const at::Tensor& row_offsets, const std::optional<at::Tensor>& bias) {
  c10::SymDimVector sizes(x.sym_sizes().begin(), x.sym_sizes().end());
  const auto out = check_sparse_linear(x, values, columns, row_offsets, bias);
  sizes.back() = out;
  return at::empty_symint(sizes, x.options());
}

}  // namespace

TORCH_LIBRARY_IMPL(rarefy, Meta, m) { m.impl("sparse_linear", &sparse_linear_meta); }

}  // namespace rarefy::ops
