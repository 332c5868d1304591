// The argument rules of compact_logits.
#pragma once

#include "ops/distillation_rule.h"

namespace rarefy::ops {

inline void check_compact_logits(const at::Tensor& logits, const at::Tensor& indices, double temperature) {
  resolve("compact_logits", {.temperature = temperature});
  const auto type = logits.scalar_type();
  TORCH_CHECK_TYPE(type == at::kFloat || type == at::kDouble || type == at::kBFloat16 || type == at::kHalf,
                   "[compact_logits] logits must be float32, float64, bfloat16 or float16, got ", type);
  TORCH_CHECK_TYPE(indices.scalar_type() == at::kLong, "[compact_logits] indices must be int64, got ",
                   indices.scalar_type());
  TORCH_CHECK_VALUE(logits.dim() >= 1, "[compact_logits] logits must have shape [..., classes], got a scalar");
  TORCH_CHECK_VALUE(indices.dim() == logits.dim(), "[compact_logits] indices must have shape [..., k] with ",
                    logits.dim(), " dimensions, as the logits, got ", indices.sym_sizes());
  const auto front = static_cast<size_t>(logits.dim()) - 1;
  TORCH_CHECK_VALUE(indices.sym_sizes().slice(0, front) == logits.sym_sizes().slice(0, front),
                    "[compact_logits] indices must have the logits' shape without classes, ",
                    logits.sym_sizes().slice(0, front), ", before k, got ", indices.sym_sizes());
  TORCH_CHECK_VALUE(indices.sym_size(-1) >= 1 && indices.sym_size(-1) <= logits.sym_size(-1),
                    "[compact_logits] k must be in [1, ", logits.sym_size(-1), "], got ", indices.sym_size(-1));
  TORCH_CHECK_VALUE(indices.device() == logits.device(), "[compact_logits] indices must be on the logits' device ",
                    logits.device(), ", got ", indices.device());
}

}  // namespace rarefy::ops
