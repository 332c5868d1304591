// Launchers of the CUDA kernels behind magnitude_mask and apply_mask_. Every launcher returns the cudaError_t of its
// launch as int. The key of an element is its magnitude's bits as int64: float64's for float64, else float32's.
#pragma once

#include <stdint.h>

#include "ops/cuda/fake_quantize_kernel.h"

namespace rarefy::cuda {

constexpr int64_t kChunk = 16384;  // elements whose ties are counted together; a multiple of 64

struct Weights {
  FloatType type;
  const void* x;
  const uint8_t* alive;  // packed mask, null for all
  int64_t elements;
};

/// Adds the alive keys in [low, high] to histogram[(key - low) >> shift], 2048 values, and raises *largest to the
/// largest key, alive or not.
int count_keys(Weights weights, int64_t low, int64_t high, int shift, unsigned long long* histogram,
               unsigned long long* largest, void* stream);

/// mask = alive and key > threshold, whole 64-bit words; ties[i / kChunk] = alive elements with key == threshold.
int write_mask(Weights weights, int64_t threshold, uint8_t* mask, int32_t* ties, void* stream);

/// Writes the chunk's mask again: of the elements with key == threshold only the first prune_first are pruned.
int keep_ties(Weights weights, int64_t threshold, int64_t chunk, int64_t prune_first, uint8_t* mask, void* stream);

/// x = +0 where the bit is 0, for a contiguous x.
int apply_mask(FloatType type, void* x, const uint8_t* mask, int64_t elements, void* stream);

}  // namespace rarefy::cuda
