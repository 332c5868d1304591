// The inner loops of formats beside plain integer grids: scales per block, minifloats, tables. No ATen here.
#pragma once

#include <stdint.h>

#include "ops/cpu/float_type.h"
#include "ops/cpu/isa.h"

namespace rarefy::cpu {

/// A tensor in memory order as rows, and which of its elements share a scale. Row r is of matrix r / matrix; strip
/// s = (r / matrix) * strips + (r % matrix) / tall has `across` blocks of `wide` columns (the last may be narrower), with the
/// scales (s % period) * across, ... Where `columns` is set, element i has scale i % length instead.
struct Blocks {
  FloatType type;
  int64_t length;  // elements of a row, at least 1
  int64_t wide, across;
  int64_t matrix, strips, tall;
  int64_t period;
  bool columns;
  int64_t origin = 0;  // the index that the first given scale has
};

/// The elements of a minifloat, as the loops compute with them. All but `overflow` are powers of two and greatest.
struct Element {
  float unit;      // 2^(23 - mantissa bits): adding it, times the power of two of a number, rounds that number
  float smallest;  // 2^e of the smallest normal exponent
  float cap;       // 2^(e + 1) of the largest exponent
  float greatest;  // largest number
  float overflow;  // what is above it becomes: greatest, infinity or NaN
};

struct IntegerRange {
  float qmin, qmax;
};

/// Values in ascending order, `count` of them, and the upper bounds of the cells of all but the last.
struct Table {
  const float* values;
  const float* bounds;
  int count;
};

RAREFY_DECLARE_ISA(
    /// y = minifloat(x / scale) * scale for elements [begin, end). x may equal y. NaN stays NaN.
    void cast_blocks(const void* x, void* y, Blocks blocks, const float* scale, Element element, bool streaming,
                     int64_t begin, int64_t end);

    /// y = (clamp(round(x / scale) + zero_point, qmin, qmax) - zero_point) * scale.
    void grid_blocks(const void* x, void* y, Blocks blocks, const float* scale, const float* zero_point,
                     IntegerRange range, bool streaming, int64_t begin, int64_t end);

    /// y = table(x / scale) * scale: the first value whose cell's bound is not below.
    void table_blocks(const void* x, void* y, Blocks blocks, const float* scale, Table table, int64_t begin,
                      int64_t end);

    /// out = grad where low <= x / scale <= high, 0 elsewhere.
    void clip_blocks(const void* grad, const void* x, void* out, Blocks blocks, const float* scale, float low,
                     float high, int64_t begin, int64_t end);

    /// out = grad where round(x / scale) + zero_point is in [qmin, qmax], 0 elsewhere.
    void clip_grid_blocks(const void* grad, const void* x, void* out, Blocks blocks, const float* scale,
                          const float* zero_point, IntegerRange range, int64_t begin, int64_t end);

    /// Lowers low[block] and raises high[block] to cover the finite elements of [begin, end). Not for `columns`.
    void block_ranges(const void* x, Blocks blocks, float* low, float* high, int64_t begin, int64_t end);

    /// Raises largest[block] to the greatest finite magnitude of [begin, end). Not for `columns`.
    void block_largest(const void* x, Blocks blocks, float* largest, int64_t begin, int64_t end);)

}  // namespace rarefy::cpu
