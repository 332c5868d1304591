#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/arange.h>
#include <ATen/ops/full.h>
#include <ATen/ops/stack.h>
#include <ATen/ops/where.h>
#include <rarefy/ops/apply_masks.h>
#include <rarefy/ops/mask.h>
#include <torch/library.h>

#include "ops/apply_masks_checks.h"

TORCH_LIBRARY_FRAGMENT(rarefy, m) {
  m.def("apply_masks_(Tensor(a!)[] tensors, Tensor[] masks) -> ()");
  m.def("stray_values(Tensor[] tensors, Tensor[] masks) -> Tensor");
}

namespace rarefy::ops {

void apply_masks_(at::TensorList tensors, at::TensorList masks) {
  if (tensors.empty() && masks.empty()) {
    return;  // no tensor to take a backend from
  }
  static const auto op =
      c10::Dispatcher::singleton().findSchemaOrThrow("rarefy::apply_masks_", "").typed<decltype(apply_masks_)>();
  op.call(tensors, masks);
}

at::Tensor stray_values(at::TensorList tensors, at::TensorList masks) {
  if (tensors.empty() && masks.empty()) {
    return at::full({0, 2}, 0, at::kLong);
  }
  static const auto op =
      c10::Dispatcher::singleton().findSchemaOrThrow("rarefy::stray_values", "").typed<decltype(stray_values)>();
  return op.call(tensors, masks);
}

namespace {

// For every backend without kernels of its own, CUDA among them.

void apply_masks_anywhere(at::TensorList tensors, at::TensorList masks) {
  check_masked_tensors("apply_masks_", tensors, masks);
  for (size_t i = 0; i < tensors.size(); ++i) {
    at::Tensor x = tensors[i];
    apply_mask_(x, masks[i]);
  }
}

at::Tensor stray_values_anywhere(at::TensorList tensors, at::TensorList masks) {
  check_masked_tensors("stray_values", tensors, masks);
  std::vector<at::Tensor> rows;
  for (size_t i = 0; i < tensors.size(); ++i) {
    const auto flat = tensors[i].reshape({-1});
    const int64_t n = flat.numel();
    const auto integers = flat.options().dtype(at::kLong);
    if (n == 0) {
      rows.push_back(at::stack({at::full({}, 0, integers), at::full({}, -1, integers)}));
      continue;
    }
    const auto shifts = at::arange(8, masks[i].options());
    const auto kept = masks[i].unsqueeze(1).bitwise_right_shift(shifts).bitwise_and(1).reshape({-1}).slice(0, 0, n);
    const auto stray = kept.eq(0).logical_and(flat.ne(0));  // NaN differs from 0, -0 does not
    const auto first = at::where(stray, at::arange(n, integers), at::full({}, n, integers)).amin();
    rows.push_back(at::stack({stray.sum(at::kLong), at::where(first.eq(n), at::full({}, -1, integers), first)}));
  }
  return at::stack(rows);
}

}  // namespace

TORCH_LIBRARY_IMPL(rarefy, CompositeExplicitAutograd, m) {
  m.impl("apply_masks_", &apply_masks_anywhere);
  m.impl("stray_values", &stray_values_anywhere);
}

}  // namespace rarefy::ops
