// Walking over dense tensors in memory order, in parallel: what the CPU kernels of the fake-quantize family share.
#pragma once

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>

#include "ops/cpu/fake_quantize_simd.h"

#if !defined(INTRA_OP_PARALLEL)
#error "at::parallel_for is a template in torch's header: without -fopenmp here it runs on one thread, silently"
#endif

namespace rarefy::ops {

constexpr int64_t kWord = 64;      // elements per word of the packed mask; ranges start on one
constexpr int64_t kGrain = 16384;  // elements below which a second thread does not pay

/// Runs body(begin, end) over [0, n) in parallel, every range starting on a whole word of the mask.
template <typename Body>
void parallel_words(int64_t n, const Body& body) {
  const int64_t words = (n + kWord - 1) / kWord;
  at::parallel_for(0, words, kGrain / kWord,
                   [&](int64_t first, int64_t last) { body(first * kWord, std::min(last * kWord, n)); });
}

/// x itself when its elements fill one block of memory, else a copy that does, in the same order of axes.
inline at::Tensor dense(const at::Tensor& x) { return x.is_non_overlapping_and_dense() ? x : x.clone(); }

/// Whether writing `out` goes past the caches: it is so large that its beginning is evicted before anyone reads it, and a
/// store past them saves reading the line first.
inline bool bypasses_caches(const at::Tensor& out) {
  constexpr size_t kThreshold = size_t{32} << 20;
  return out.nbytes() >= kThreshold;
}

/// How the channels of a dense x lie in memory; axis -1 is one channel.
inline cpu::Layout layout_of(const at::Tensor& x, int64_t axis) {
  const auto type = x.scalar_type() == at::kBFloat16 ? cpu::FloatType::bf16
                    : x.scalar_type() == at::kHalf   ? cpu::FloatType::f16
                                                     : cpu::FloatType::f32;
  const bool one_channel = axis < 0 || x.size(axis) == 1;
  return {type, one_channel ? 1 : x.size(axis), one_channel ? std::max<int64_t>(x.numel(), 1) : x.stride(axis)};
}

/// The same assignment with one channel per element of the repeating pattern, where runs of one channel are shorter than
/// a vector and the pattern comes often enough to pay for writing it out: channels-last images with 3 channels, say.
/// Channel c of the result is channel c / layout.inner % layout.channels of `layout`.
inline cpu::Layout spread(cpu::Layout layout, int64_t elements) {
  constexpr int64_t kShortRun = 16, kRow = 256;
  const int64_t period = layout.channels * layout.inner;
  if (layout.channels == 1 || layout.inner >= kShortRun || elements < 4 * std::max(period, kRow)) {
    return layout;
  }
  const int64_t repeats = period < kRow ? (kRow + period - 1) / period : 1;
  return {layout.type, period * repeats, 1};
}

}  // namespace rarefy::ops
