#include "ops/cpu/brain_surgery_simd.h"

namespace rarefy::cpu::RAREFY_ISA {
namespace {

// Loops of a constant number of lanes become vectors; there is no product and sum in one operation, so that every
// instruction set gives the same bits.

template <typename T>
void costs(const T* w, int64_t stride, const SurgeryBlock<T>& block, int64_t rows, T* scores) {
  for (int64_t r = 0; r < rows; ++r) {
    const T* from = w + r * stride;
    T* to = scores + r * block.width;
    for (int64_t i = 0; i < block.width; ++i) {
      const T error = from[i] / block.diagonal[i];
      to[i] = error * error;
    }
  }
}

/// Keeps the N of largest cost of columns [begin, end); of equal ones the later. cost: scratch.
template <typename T>
void choose(const T* row, const SurgeryBlock<T>& block, int64_t begin, int64_t end, T* cost, uint8_t* keep) {
  for (int64_t i = begin; i < end; ++i) {
    const T error = row[i] / block.diagonal[i];
    cost[i] = error * error;
  }
  const int64_t pruned = end - begin - block.keep_of_group;
  for (int64_t i = begin; i < end; ++i) {
    int64_t cheaper = 0;
    for (int64_t j = begin; j < end; ++j) {
      cheaper += cost[j] < cost[i] || (cost[j] == cost[i] && j < i) ? 1 : 0;
    }
    keep[i] = cheaper < pruned ? 0 : 1;
  }
}

template <typename T>
void surgery(T* w, int64_t stride, const SurgeryBlock<T>& block, uint8_t* keep, int64_t keep_stride, T* errors,
             int64_t errors_stride, int64_t rows, T* __restrict row) {
  for (int64_t r = 0; r < rows; ++r) {
    T* const own = w + r * stride;
    uint8_t* const kept = keep + r * keep_stride;
    T* const error_row = errors + r * errors_stride;
    for (int64_t i = 0; i < block.width; ++i) row[i] = own[i];
    for (int64_t i = block.width; i < block.padded; ++i) row[i] = 0;
    for (int64_t i = 0; i < block.width; ++i) {
      if (block.group_end != nullptr && block.group_end[i] > 0) {
        choose(row, block, i, block.group_end[i], row + block.padded, kept);
      }
      if (kept[i] != 0) {
        error_row[i] = 0;
        continue;
      }
      const T error = row[i] / block.diagonal[i];
      error_row[i] = error;
      const T* const __restrict u = block.u + i * block.padded;
      for (int64_t j = i / kSurgeryLanes * kSurgeryLanes; j < block.padded; j += kSurgeryLanes) {
        for (int64_t lane = 0; lane < kSurgeryLanes; ++lane) row[j + lane] -= error * u[j + lane];
      }
      row[i] = 0;
    }
    for (int64_t i = 0; i < block.width; ++i) own[i] = row[i];
  }
}

}  // namespace

void surgery_costs(const float* w, int64_t stride, const SurgeryBlock<float>& block, int64_t rows, float* scores) {
  costs(w, stride, block, rows, scores);
}
void surgery_costs(const double* w, int64_t stride, const SurgeryBlock<double>& block, int64_t rows, double* scores) {
  costs(w, stride, block, rows, scores);
}
void surgery_rows(float* w, int64_t stride, const SurgeryBlock<float>& block, uint8_t* keep, int64_t keep_stride,
                  float* errors, int64_t errors_stride, int64_t rows, float* row) {
  surgery(w, stride, block, keep, keep_stride, errors, errors_stride, rows, row);
}
void surgery_rows(double* w, int64_t stride, const SurgeryBlock<double>& block, uint8_t* keep, int64_t keep_stride,
                  double* errors, int64_t errors_stride, int64_t rows, double* row) {
  surgery(w, stride, block, keep, keep_stride, errors, errors_stride, rows, row);
}

}  // namespace rarefy::cpu::RAREFY_ISA
