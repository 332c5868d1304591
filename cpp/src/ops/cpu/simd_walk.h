// Walking over a range of a dense tensor whose grid is per tensor or per channel, and packing masks on the way: what the
// vector loops of quantization share. Only for files that cmake/RarefyIsa.cmake compiles.
#pragma once

#include "ops/cpu/fake_quantize_simd.h"
#include "ops/cpu/simd.h"

namespace rarefy::cpu::RAREFY_ISA {

constexpr uint32_t kAllLanes = (1u << Vec::size) - 1u;

/// Appends bits and writes them out 64 at a time; a range starts on a whole 64-bit word.
class BitWriter {
 public:
  explicit BitWriter(uint8_t* out) : out_(out) {}

  /// 64 bits at once; only when a whole number of words has been pushed before.
  void push_word(uint64_t word) {
    memcpy(out_, &word, 8);
    out_ += 8;
  }
  void push(uint32_t bits, int count) {
    word_ |= static_cast<uint64_t>(bits) << fill_;
    fill_ += count;
    if (fill_ >= 64) {
      push_word(word_);
      fill_ -= 64;
      word_ = fill_ == 0 ? 0 : static_cast<uint64_t>(bits) >> (count - fill_);
    }
  }
  void finish() {
    if (fill_ > 0) {
      push_word(word_);
    }
  }

 private:
  uint8_t* out_;
  uint64_t word_ = 0;
  int fill_ = 0;
};

struct Parameters {
  Vec scale, zero_point, qmin, qmax;

  explicit Parameters(Grid grid) : qmin(grid.qmin), qmax(grid.qmax) {}
  /// One channel for all lanes.
  void set(Grid grid, int64_t channel) {
    scale = Vec(grid.scale[channel]);
    zero_point = Vec(grid.zero_point[channel]);
  }
  /// Channels channel, channel + 1, ... for the first `count` lanes.
  void load(Grid grid, int64_t channel, int count) {
    const bool whole = count == Vec::size;
    scale = whole ? Vec::load(grid.scale + channel) : Vec::load_first(grid.scale + channel, count, 1.0f);
    zero_point = whole ? Vec::load(grid.zero_point + channel) : Vec::load_first(grid.zero_point + channel, count, 0.0f);
  }
};

inline Vec to_grid(Vec x, const Parameters& p) { return round_even(x / p.scale) + p.zero_point; }
// The bounds come first: max(low, NaN) is NaN, so that a NaN stays visible in simulated execution.
inline Vec clamp(Vec q, const Parameters& p) { return min(p.qmax, max(p.qmin, q)); }

/// Calls run(first, last, channel) for each stretch of [begin, end) that belongs to one channel, in order.
template <typename Run>
inline void for_each_run(Layout layout, int64_t begin, int64_t end, Run run) {
  for (int64_t i = begin; i < end;) {
    const int64_t block = i / layout.inner;
    const int64_t block_end = (block + 1) * layout.inner < end ? (block + 1) * layout.inner : end;
    run(i, block_end, block % layout.channels);
    i = block_end;
  }
}

/// Where the channel is the fastest axis: calls body(first, channel, count) for stretches of at most Vec::size elements
/// with channels channel, channel + 1, ..., in order.
template <typename Body>
inline void for_each_row_vector(Layout layout, int64_t begin, int64_t end, Body body) {
  for (int64_t i = begin; i < end;) {
    int64_t channel = i % layout.channels;
    const int64_t row_end = i + (layout.channels - channel) < end ? i + (layout.channels - channel) : end;
    for (; i + Vec::size <= row_end; i += Vec::size, channel += Vec::size) {
      body(i, channel, Vec::size);
    }
    if (i < row_end) {
      body(i, channel, static_cast<int>(row_end - i));
      i = row_end;
    }
  }
}

/// Whether for_each_row_vector fills its vectors.
inline bool has_rows(Layout layout) { return layout.inner == 1 && layout.channels >= Vec::size; }

template <typename T>
inline Vec load_some(const T* p, int count) {
  return count == Vec::size ? Vec::load(p) : Vec::load_first(p, count, 0.0f);
}
template <typename T>
inline void store_some(Vec value, T* p, int count) {
  count == Vec::size ? value.store(p) : value.store_first(p, count);
}

}  // namespace rarefy::cpu::RAREFY_ISA
