// The argument rules of apply_masks_ and stray_values, applied by every backend's kernel.
#pragma once

#include "ops/mask_checks.h"

namespace rarefy::ops {

inline void check_masked_tensors(const char* function, at::TensorList tensors, at::TensorList masks) {
  TORCH_CHECK_VALUE(tensors.size() == masks.size(), "[", function, "] needs one mask per tensor, got ", masks.size(),
                    " masks for ", tensors.size(), " tensors");
  for (size_t i = 0; i < tensors.size(); ++i) {
    check_float(function, tensors[i], "tensors");
    check_mask(function, tensors[i], masks[i]);
    for (int64_t d = 0; d < tensors[i].dim(); ++d) {
      TORCH_CHECK_VALUE(tensors[i].sym_stride(d) != 0 || tensors[i].sym_size(d) <= 1, "[", function,
                        "] tensors must not overlap themselves, got stride 0 in dimension ", d, " of size ",
                        tensors[i].sym_size(d), " in tensor ", i);
    }
  }
}

}  // namespace rarefy::ops
