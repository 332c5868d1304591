// The inner loops of integer inference beside those of quantize and dequantize, on one range of dense bytes. No ATen here.
#pragma once

#include <stdint.h>

#include "ops/cpu/fake_quantize_simd.h"

namespace rarefy::cpu {

/// Two tensors of bytes in the same order, and their grids.
struct Terms {
  const uint8_t *a, *b;
  float a_scale, a_zero_point, b_scale, b_zero_point;
};

/// Channels-last bytes and the windows over them.
struct Windows {
  int64_t channels, height, width, out_height, out_width;
  int64_t kernel[2], stride[2], padding[2], dilation[2];
};

RAREFY_DECLARE_ISA(
    /// y = (a - a_zero_point) * a_scale + (b - b_zero_point) * b_scale, then max(y, 0) when relu, for elements [begin, end).
    void add_bytes(Terms terms, bool relu, float* y, int64_t begin, int64_t end);

    /// The integers of that sum on a grid of one channel: clamp(round(y / scale) + zero_point, qmin, qmax).
    void add_bytes_to_grid(Terms terms, Grid grid, uint8_t* y, int64_t begin, int64_t end);

    /// The largest byte of every window, for rows [begin, end) of out_width pixels, out_height of them to an image.
    void max_pool_bytes(const uint8_t* x, uint8_t* y, Windows windows, int64_t begin, int64_t end);)

}  // namespace rarefy::cpu
