// Launcher of the CUDA kernel behind relu_mask. Returns the cudaError_t of its launch as int.
#pragma once

#include <stdint.h>

#include "ops/cuda/fake_quantize_kernel.h"

namespace rarefy::cuda {

/// y = max(x, 0), NaN staying NaN; mask has one bit per element, 1 where not x <= 0, in whole 64-bit words that are filled
/// up with 0. x may equal y.
int relu_mask(FloatType type, const void* x, void* y, void* mask, int64_t elements, void* stream);

}  // namespace rarefy::cuda
