// The inner loops of SparseGPT on a block of columns. No ATen here.
#pragma once

#include <stdint.h>

#include "ops/cpu/isa.h"

namespace rarefy::cpu {

constexpr int64_t kSurgeryLanes = 16;  // rows of `u` and of `row` are padded with zeros to a multiple of this

/// A block of columns of the factor U of the inverse Hessian.
template <typename T>
struct SurgeryBlock {
  const T* u;         // [width, padded]: U to the right of its diagonal, zeros elsewhere
  const T* diagonal;  // [width]
  const int32_t*
      group_end;  // [width]: where column i begins a group of N:M, the column behind it; else 0. Null: no groups
  int64_t keep_of_group;  // N
  int64_t width;
  int64_t padded;
};

RAREFY_DECLARE_ISA(
    /// scores[r, i] = (w[r, i] / diagonal[i])^2, what pruning costs. w has `stride`, scores none.
    void surgery_costs(const float* w, int64_t stride, const SurgeryBlock<float>& block, int64_t rows, float* scores);
    void surgery_costs(const double* w, int64_t stride, const SurgeryBlock<double>& block, int64_t rows,
                       double* scores);

    /// Prunes where keep is 0 and makes up for it within the block, column by column: w becomes the pruned weights and
    /// errors w[r, i] / diagonal[i] of what is pruned, else 0. With groups, keep is chosen here, when a group is
    /// reached. row: scratch of 2 * `padded` values.
    void surgery_rows(float* w, int64_t stride, const SurgeryBlock<float>& block, uint8_t* keep, int64_t keep_stride,
                      float* errors, int64_t errors_stride, int64_t rows, float* row);
    void surgery_rows(double* w, int64_t stride, const SurgeryBlock<double>& block, uint8_t* keep, int64_t keep_stride,
                      double* errors, int64_t errors_stride, int64_t rows, double* row);)

}  // namespace rarefy::cpu
