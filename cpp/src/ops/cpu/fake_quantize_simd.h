// The inner loops of fake_quantize, quantize and observe on one range of a dense tensor. No ATen here.
#pragma once

#include <stdint.h>

#include "ops/cpu/float_type.h"
#include "ops/cpu/isa.h"

namespace rarefy::cpu {

/// A dense tensor in memory order. Element i belongs to channel (i / inner) % channels.
struct Layout {
  FloatType type;
  int64_t channels;  // 1 for per-tensor parameters
  int64_t inner;     // stride of the channel axis; the number of elements for per-tensor parameters
};

struct Grid {
  const float* scale;       // channels values, finite and positive
  const float* zero_point;  // channels whole values in [qmin, qmax]
  float qmin;
  float qmax;
};

RAREFY_DECLARE_ISA(
    /// y = (clamp(round(x / scale) + zero_point, qmin, qmax) - zero_point) * scale for elements [begin, end).
    /// mask (may be null): bit i is 1 where the value was not clamped; the last word is filled up with 0.
    /// begin is a multiple of 64, so is end unless it is the tensor's. x may equal y. streaming: y bypasses the caches.
    void fake_quantize(const void* x, void* y, uint8_t* mask, Layout layout, Grid grid, bool streaming, int64_t begin,
                       int64_t end);

    /// The integer clamp(round(x / scale) + zero_point, qmin, qmax), lowest byte, for elements [begin, end).
    void quantize(const void* x, uint8_t* y, Layout layout, Grid grid, int64_t begin, int64_t end);

    /// out = grad where the bit of mask is 1, 0 elsewhere, for elements [begin, end) of element_bytes (2 or 4) each.
    /// begin is a multiple of 64. grad may equal out. streaming: out bypasses the caches.
    void mask_gradient(const void* grad, const uint8_t* mask, void* out, int element_bytes, bool streaming,
                       int64_t begin, int64_t end);

    /// Lowers minimum[channel] and raises maximum[channel] to cover elements [begin, end). Returns false, with both in an
    /// unspecified state, when a value is NaN or infinite.
    bool min_max(const void* x, Layout layout, float* minimum, float* maximum, int64_t begin, int64_t end);)

}  // namespace rarefy::cpu
