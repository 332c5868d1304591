// Steps of fake_quantize on the CPU that observe_fake_quantize takes too.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>

namespace rarefy::ops {

/// x_hat of a dense x into `out` (same strides) and, unless it is null, the packed mask of what was not clamped.
/// axis is resolved (-1: one scale). Throws c10::ValueError for a scale or zero point out of range, before it writes.
void fake_quantize_into(const char* function, const at::Tensor& x, const at::Tensor& out, uint8_t* mask,
                        const at::Tensor& scale, const at::Tensor& zero_point, int64_t axis, int64_t qmin,
                        int64_t qmax);

/// Whether every one of the first `elements` bits of a packed mask is set.
bool is_all_ones(const at::Tensor& mask, int64_t elements);

/// Uninitialized memory for the packed mask of x.
at::Tensor empty_mask(const at::Tensor& x);

}  // namespace rarefy::ops
