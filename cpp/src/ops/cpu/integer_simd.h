// The inner loops around integer matrix products, on one range of a dense tensor. No ATen here.
#pragma once

#include <stdint.h>

#include "ops/cpu/fake_quantize_simd.h"

namespace rarefy::cpu {

/// Sums of a matrix product in memory order, `columns` to a row, and what turns them into the layer's result.
struct Finish {
  int64_t columns;
  const int32_t* offset;  // columns values, subtracted from the sums: input zero point times the weight's sums
  const float* scale;     // columns values: input scale times weight scale
  const float* bias;      // columns values, or null
  bool relu;
};

RAREFY_DECLARE_ISA(
    /// The integer clamp(round(x * multiplier / scale) + zero_point, qmin, qmax), lowest byte, and the mask of what was not
    /// clamped, for elements [begin, end). multiplier: one value per channel, or null for 1.
    /// begin is a multiple of 64. Returns false when a product is NaN (its byte is then qmax).
    bool quantize_mask(const void* x, uint8_t* q, uint8_t* mask, Layout layout, Grid grid, const float* multiplier,
                       int64_t begin, int64_t end);

    /// y = (q - zero_point) * scale of bytes with or without a sign, for elements [begin, end); y is of layout.type.
    void dequantize(const uint8_t* q, bool is_signed, void* y, Layout layout, const float* scale,
                    const float* zero_point, int64_t begin, int64_t end);

    /// y = float(sums - offset) * scale + bias, then max(y, 0) when relu, for elements [begin, end); y may be the memory of
    /// sums when type is f32. mask (may be null): bit i is 1 where not y <= 0. begin is a multiple of 64.
    void finish_sums(const int32_t* sums, void* y, FloatType type, uint8_t* mask, Finish finish, int64_t begin,
                     int64_t end);

    /// Bit i of mask is 1 where not y[i] <= 0, which a NaN is not, for elements [begin, end); begin is a multiple of 64.
    void positive_mask(const float* y, uint8_t* mask, int64_t begin, int64_t end);

    /// y = x * scale[column], columns to a row, rounded to bfloat16, for elements [begin, end).
    void scale_to_bf16(const void* x, FloatType type, void* y, int64_t columns, const float* scale, int64_t begin,
                       int64_t end);

    /// y = x * scale[row] for rows [begin, end) of `columns` each, from bfloat16 to float32.
    void scale_rows_from_bf16(const void* x, float* y, int64_t columns, const float* scale, int64_t begin, int64_t end);

    /// sums[i] = sum over n bytes of weight row i in [begin, end).
    void sum_bytes(const int8_t* weight, int64_t n, int32_t* sums, int64_t begin, int64_t end);)

}  // namespace rarefy::cpu
