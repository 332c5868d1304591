// The inner loops of sparse_linear on ranges of rows. No ATen here.
#pragma once

#include <stdint.h>

#include "ops/cpu/float_type.h"
#include "ops/cpu/isa.h"

namespace rarefy::cpu {

/// A sparse weight [rows * height, columns * width], as rarefy::ops::SparseWeight describes it; offsets have been checked.
struct SparseMatrix {
  FloatType type;  // of the values: f32 or bf16
  const void* values;
  const void* columns;
  bool wide_columns;       // int32 instead of int16
  const int64_t* offsets;  // [rows + 1]
  int64_t height, width;   // of a block
  int64_t column_count;    // of blocks
};

constexpr int kTileStep = 16;  // samples of a tile come in steps of so many
constexpr int kTileMost = 64;  // and are at most so many

/// Whether sparse_vector knows blocks of that size.
constexpr bool has_vector_kernel(int64_t height, int64_t width) {
  const int64_t size = height * width;
  const bool pattern = width == 1 || width == 2 || width == 4 || width == 8 || width % 16 == 0;
  return size == 1 || (size % 16 == 0 && size <= 64 && pattern);
}

/// Floats of scratch memory that sparse_vector needs.
constexpr int64_t vector_scratch(int64_t height, int64_t width, int64_t column_count) {
  return height * width > 1 && width > 1 && width < 16 ? column_count * 16 : 0;
}

RAREFY_DECLARE_ISA(
    /// Fills the scratch memory of sparse_vector from x [columns * width].
    void sparse_expand(const SparseMatrix& matrix, const float* x, float* scratch);
    /// y[r] = sum of products of row r with x, for the rows of blocks [begin, end). False for a column that is not there.
    bool sparse_vector(const SparseMatrix& matrix, const float* x, const float* scratch, float* y, int64_t begin,
                       int64_t end);
    /// tile[k][s] = x[s][k] for k in [begin, end), with 0 for s in [samples, lanes); x [samples, features].
    void sparse_pack(FloatType type, const void* x, int64_t samples, int64_t features, float* tile, int lanes,
                     int64_t begin, int64_t end);
    /// out[r][s] = sum of products of row r with tile[.][s], r counted from the first row of block `begin`.
    bool sparse_tile(const SparseMatrix& matrix, const float* tile, int lanes, float* out, int64_t begin, int64_t end);
    /// y[s * features + first + r] = rows[r][s] + bias[first + r] (no bias: null), for r in [0, count), s in [0, samples).
    void sparse_unpack(FloatType type, const float* rows, int lanes, int64_t count, int64_t samples, const float* bias,
                       void* y, int64_t features, int64_t first);)

}  // namespace rarefy::cpu
