// The inner loop of fake_quantize_learned_backward on one range of a dense tensor. No ATen here.
#pragma once

#include <stdint.h>

#include "ops/cpu/fake_quantize_simd.h"

namespace rarefy::cpu {

/// Whether sums are kept per column of a row, in an array, instead of in registers. Not a matter of the instruction set:
/// the order of the additions follows from it.
inline bool sums_by_row(Layout layout) { return layout.inner == 1 && layout.channels >= 16; }

RAREFY_DECLARE_ISA(
    /// out = grad where x is not clamped, 0 elsewhere, for elements [begin, end), bit by bit; and to sums[channel] is added
    /// the sum of grad * t, with t as in rarefy/ops/fake_quantize_learned.h. The additions come in an order that layout,
    /// begin and end decide. columns: layout.channels zeros where sums_by_row(layout), and zeros again on return; unused
    /// elsewhere. grad may equal out. streaming: out bypasses the caches.
    void learned_gradient(const void* grad, const void* x, void* out, Layout layout, Grid grid, bool streaming,
                          double* sums, float* columns, int64_t begin, int64_t end);)

}  // namespace rarefy::cpu
