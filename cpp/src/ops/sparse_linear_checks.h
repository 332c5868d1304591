// The argument rules of sparse_linear that need no values, applied by every backend.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/Exception.h>

#include <optional>

namespace rarefy::ops {

/// Returns the number of output features.
inline c10::SymInt check_sparse_linear(const at::Tensor& x, const at::Tensor& values, const at::Tensor& columns,
                                       const at::Tensor& row_offsets, const std::optional<at::Tensor>& bias) {
  constexpr const char* function = "[sparse_linear] ";
  const auto type = values.scalar_type();
  TORCH_CHECK_TYPE(type == at::kFloat || type == at::kBFloat16, function, "values must be float32 or bfloat16, got ",
                   type);
  TORCH_CHECK_TYPE(x.scalar_type() == type, function, "input must be of the type of the values, ", type, ", got ",
                   x.scalar_type());
  TORCH_CHECK_TYPE(columns.scalar_type() == at::kShort || columns.scalar_type() == at::kInt, function,
                   "columns must be int16 or int32, got ", columns.scalar_type());
  TORCH_CHECK_TYPE(row_offsets.scalar_type() == at::kLong, function, "row_offsets must be int64, got ",
                   row_offsets.scalar_type());
  TORCH_CHECK_VALUE(x.dim() >= 1, function, "input must have at least 1 dimension, got 0");
  TORCH_CHECK_VALUE(values.dim() == 1 || values.dim() == 3, function,
                    "values must have shape [kept] or [blocks, height, width], got ", values.sym_sizes());
  const bool blocks = values.dim() == 3;
  const c10::SymInt height = blocks ? values.sym_size(1) : c10::SymInt(1);
  const c10::SymInt width = blocks ? values.sym_size(2) : c10::SymInt(1);
  TORCH_CHECK_VALUE(height > 0 && width > 0, function, "blocks must not be empty, got ", values.sym_sizes());
  TORCH_CHECK_VALUE(columns.dim() == 1 && columns.sym_size(0) == values.sym_size(0), function,
                    "columns must have shape [", values.sym_size(0), "] (one per value or block), got ",
                    columns.sym_sizes());
  TORCH_CHECK_VALUE(row_offsets.dim() == 1 && row_offsets.sym_size(0) >= 1, function,
                    "row_offsets must have shape [rows + 1], got ", row_offsets.sym_sizes());
  TORCH_CHECK_VALUE(x.sym_size(-1) % width == 0, function, "input must have a multiple of ", width,
                    " features (the width of a block), got ", x.sym_size(-1));
  const auto out = (row_offsets.sym_size(0) - 1) * height;
  if (bias.has_value()) {
    TORCH_CHECK_TYPE(bias->scalar_type() == type, function, "bias must be of the type of the values, ", type, ", got ",
                     bias->scalar_type());
    TORCH_CHECK_VALUE(bias->dim() == 1 && bias->sym_size(0) == out, function, "bias must have shape [", out, "], got ",
                      bias->sym_sizes());
  }
  for (const auto* tensor : {&values, &columns, &row_offsets, bias.has_value() ? &*bias : &values}) {
    TORCH_CHECK_VALUE(tensor->device() == x.device(), function, "weight and bias must be on the input's device ",
                      x.device(), ", got ", tensor->device());
  }
  return out;
}

}  // namespace rarefy::ops
