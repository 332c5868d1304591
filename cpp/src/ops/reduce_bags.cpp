#include "ops/reduce_bags.h"

#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/arange.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/embedding_bag.h>
#include <ATen/ops/where.h>
#include <torch/library.h>

#include <string_view>

TORCH_LIBRARY_FRAGMENT(rarefy, m) {
  m.def(
      "reduce_bags(Tensor rows, Tensor indices, Tensor? offsets=None, Tensor? per_sample_weights=None, str mode='mean', "
      "bool include_last_offset=False, int? padding_idx=None) -> Tensor");
}

namespace rarefy::ops {
namespace {

/// As torch numbers them.
int64_t number_of(std::string_view mode) {
  TORCH_CHECK_VALUE(mode == "sum" || mode == "mean" || mode == "max",
                    "[reduce_bags] mode must be 'sum', 'mean' or 'max', got '", mode, "'");
  return mode == "sum" ? 0 : mode == "mean" ? 1 : 2;
}

void check(const at::Tensor& rows, const at::Tensor& indices, const std::optional<at::Tensor>& offsets,
           const std::optional<at::Tensor>& weights, std::string_view mode) {
  TORCH_CHECK_TYPE(rows.is_floating_point(), "[reduce_bags] rows must be floating point, got ", rows.scalar_type());
  TORCH_CHECK_TYPE(indices.scalar_type() == at::kLong || indices.scalar_type() == at::kInt,
                   "[reduce_bags] indices must be int32 or int64, got ", indices.scalar_type());
  TORCH_CHECK_VALUE(rows.dim() == 2 && rows.sym_size(0) == indices.sym_numel(), "[reduce_bags] rows must be [",
                    indices.sym_numel(), ", width], one for each index, got shape ", rows.sym_sizes());
  TORCH_CHECK_VALUE(indices.dim() == 1 || indices.dim() == 2,
                    "[reduce_bags] indices must have one dimension or two, got ", indices.dim());
  TORCH_CHECK_VALUE((indices.dim() == 1) == offsets.has_value(),
                    "[reduce_bags] offsets must be given for indices of one dimension, and for no others, got ",
                    offsets.has_value() ? "them" : "none", " and shape ", indices.sym_sizes());
  TORCH_CHECK_VALUE(!offsets.has_value() || offsets->dim() == 1,
                    "[reduce_bags] offsets must have one dimension, got shape ",
                    offsets.has_value() ? offsets->sym_sizes() : indices.sym_sizes());
  if (weights.has_value()) {
    TORCH_CHECK_VALUE(mode == "sum", "[reduce_bags] per_sample_weights belong to mode 'sum', got '", mode, "'");
    TORCH_CHECK_VALUE(weights->sym_sizes() == indices.sym_sizes(),
                      "[reduce_bags] per_sample_weights must have the shape of the indices, ", indices.sym_sizes(),
                      ", got ", weights->sym_sizes());
  }
}

/// torch's bags of the rows as a table, in which the n-th index looks up the n-th row.
at::Tensor reduce_bags_any(const at::Tensor& rows, const at::Tensor& indices, const std::optional<at::Tensor>& offsets,
                           const std::optional<at::Tensor>& per_sample_weights, std::string_view mode,
                           bool include_last_offset, std::optional<int64_t> padding_idx) {
  const auto number = number_of(mode);
  check(rows, indices, offsets, per_sample_weights, mode);
  const auto options = at::TensorOptions().dtype(at::kLong).device(rows.device());
  const auto count = indices.sym_numel();
  auto table = rows;
  auto places = at::arange(padding_idx.has_value() ? 1 : 0, padding_idx.has_value() ? count + 1 : count, options);
  std::optional<int64_t> left_out;
  if (padding_idx.has_value()) {  // a row of its own, the first one, stands for what is left out
    table = at::cat({rows.new_zeros_symint({1, rows.sym_size(1)}), rows});
    places = at::where(indices.reshape({-1}).eq(*padding_idx), 0, places);
    left_out = 0;
  }
  const auto begins = offsets.has_value() ? *offsets : at::arange(0, count, indices.sym_size(1), options);
  std::optional<at::Tensor> weights;
  if (per_sample_weights.has_value()) {
    weights = per_sample_weights->reshape({-1}).to(rows.scalar_type());
  }
  return std::get<0>(at::embedding_bag(table, places, begins, /*scale_grad_by_freq=*/false, number, /*sparse=*/false,
                                       weights, include_last_offset, left_out));
}

}  // namespace

at::Tensor reduce_bags(const at::Tensor& rows, const at::Tensor& indices, const std::optional<at::Tensor>& offsets,
                       const std::optional<at::Tensor>& per_sample_weights, const std::string& mode,
                       bool include_last_offset, std::optional<int64_t> padding_idx) {
  static const auto op =
      c10::Dispatcher::singleton().findSchemaOrThrow("rarefy::reduce_bags", "").typed<decltype(reduce_bags_any)>();
  return op.call(rows, indices, offsets, per_sample_weights, mode, include_last_offset, padding_idx);
}

TORCH_LIBRARY_IMPL(rarefy, CompositeImplicitAutograd, m) { m.impl("reduce_bags", &reduce_bags_any); }

}  // namespace rarefy::ops
