#include "ops/cpu/fake_quantize_simd.h"

#include "ops/cpu/simd.h"
#include "ops/cpu/simd_walk.h"

namespace rarefy::cpu::RAREFY_ISA {
namespace {

// --- fake_quantize ----------------------------------------------------------------------------------------------------

template <typename T, bool Masked>
class FakeQuantizer {
 public:
  FakeQuantizer(const T* x, T* y, uint8_t* mask) : x_(x), y_(y), bits_(mask) {}

  /// At most Vec::size elements.
  void some(int64_t i, int count, const Parameters& p) {
    const Vec q = to_grid(load_some(x_ + i, count), p);
    store_some((clamp(q, p) - p.zero_point) * p.scale, y_ + i, count);
    if (Masked) {
      bits_.push(within(q, p.qmin, p.qmax) & ((1u << count) - 1u), count);
    }
  }

  template <bool Streaming>
  void run(int64_t i, int64_t end, const Parameters& p) {
    if (i % 64 == 0) {
      for (; i + 64 <= end; i += 64) {
        uint64_t word = 0;
        for (int lane = 0; lane < 64; lane += Vec::size) {
          const Vec q = to_grid(Vec::load(x_ + i + lane), p);
          const Vec out = (clamp(q, p) - p.zero_point) * p.scale;
          Streaming ? out.stream(y_ + i + lane) : out.store(y_ + i + lane);
          if (Masked) {
            word |= static_cast<uint64_t>(within(q, p.qmin, p.qmax)) << lane;
          }
        }
        if (Masked) {
          bits_.push_word(word);
        }
      }
    }
    for (; i < end; i += Vec::size) {
      some(i, end - i < Vec::size ? static_cast<int>(end - i) : Vec::size, p);
    }
  }

  void finish() {
    if (Masked) {
      bits_.finish();
    }
  }

 private:
  const T* x_;
  T* y_;
  BitWriter bits_;
};

template <typename T, bool Masked>
void fake_quantize_range(const T* x, T* y, uint8_t* mask, Layout layout, Grid grid, bool streaming, int64_t begin,
                         int64_t end) {
  FakeQuantizer<T, Masked> quantizer(x, y, Masked ? mask + begin / 8 : nullptr);
  Parameters p(grid);
  streaming = streaming && reinterpret_cast<uintptr_t>(y) % kStreamAlignment == 0;
  if (has_rows(layout)) {
    for_each_row_vector(layout, begin, end, [&](int64_t i, int64_t channel, int count) {
      p.load(grid, channel, count);
      quantizer.some(i, count, p);
    });
  } else {
    for_each_run(layout, begin, end, [&](int64_t first, int64_t last, int64_t channel) {
      p.set(grid, channel);
      streaming ? quantizer.template run<true>(first, last, p) : quantizer.template run<false>(first, last, p);
    });
  }
  quantizer.finish();
  if (streaming) {
    stream_fence();
  }
}

// --- quantize -----------------------------------------------------------------------------------------------------------

template <typename T>
inline void quantize_some(const T* x, uint8_t* y, int64_t i, int count, const Parameters& p) {
  // An integer has no NaN: min(q, qmax) with the bound second turns it into qmax.
  const Vec clamped = max(p.qmin, min(to_grid(load_some(x + i, count), p), p.qmax));
  count == Vec::size ? clamped.store_bytes(y + i) : clamped.store_bytes_first(y + i, count);
}

template <typename T>
void quantize_range(const T* x, uint8_t* y, Layout layout, Grid grid, int64_t begin, int64_t end) {
  Parameters p(grid);
  if (has_rows(layout)) {
    for_each_row_vector(layout, begin, end, [&](int64_t i, int64_t channel, int count) {
      p.load(grid, channel, count);
      quantize_some(x, y, i, count, p);
    });
    return;
  }
  for_each_run(layout, begin, end, [&](int64_t i, int64_t last, int64_t channel) {
    p.set(grid, channel);
    for (; i + Vec::size <= last; i += Vec::size) {
      quantize_some(x, y, i, Vec::size, p);
    }
    if (i < last) {
      quantize_some(x, y, i, static_cast<int>(last - i), p);
    }
  });
}

// --- mask_gradient ------------------------------------------------------------------------------------------------------

/// Moves bits and does no arithmetic: every value comes through as it is, NaN payloads too.
template <bool Streaming, typename Word>
void mask_gradient_range(const Word* grad, const uint8_t* mask, Word* out, int64_t begin, int64_t end) {
  int64_t i = begin;
  uint64_t word = 0;
  for (; i + 64 <= end; i += 64) {
    memcpy(&word, mask + i / 8, 8);
    keep_words<Streaming>(grad + i, word, out + i);
  }
  if (i < end) {
    memcpy(&word, mask + i / 8, 8);
    keep_words_tail(grad + i, word, out + i, static_cast<int>(end - i));
  }
  if (Streaming) {
    stream_fence();
  }
}

template <typename Word>
void mask_gradient_words(const void* grad, const uint8_t* mask, void* out, bool streaming, int64_t begin, int64_t end) {
  const auto* in = static_cast<const Word*>(grad);
  auto* to = static_cast<Word*>(out);
  if (streaming && reinterpret_cast<uintptr_t>(out) % kStreamAlignment == 0) {
    mask_gradient_range<true>(in, mask, to, begin, end);
  } else {
    mask_gradient_range<false>(in, mask, to, begin, end);
  }
}

// --- min_max ------------------------------------------------------------------------------------------------------------

/// The range of a run and whether it is finite: value - value is 0 for finite values and NaN otherwise, and sticks.
struct RunningRange {
  Vec low, high, unusual;

  RunningRange(float least_so_far, float greatest_so_far) : low(least_so_far), high(greatest_so_far), unusual(0.0f) {}
  void add(Vec value) {
    low = min(value, low);
    high = max(value, high);
    unusual = unusual + (value - value);
  }
  void add(const RunningRange& other) {
    low = min(other.low, low);
    high = max(other.high, high);
    unusual = unusual + other.unusual;
  }
};

inline bool all_zero(Vec sticky) { return within(sticky, Vec(0.0f), Vec(0.0f)) == kAllLanes; }

template <typename T>
bool min_max_rows(const T* x, Layout layout, float* minimum, float* maximum, int64_t begin, int64_t end) {
  Vec unusual(0.0f);
  for_each_row_vector(layout, begin, end, [&](int64_t i, int64_t channel, int count) {
    float* low = minimum + channel;
    float* high = maximum + channel;
    if (count == Vec::size) {
      const Vec value = Vec::load(x + i);
      min(value, Vec::load(low)).store(low);
      max(value, Vec::load(high)).store(high);
      unusual = unusual + (value - value);
    } else {
      const Vec value = Vec::load_first(x + i, count, 0.0f);
      min(value, Vec::load_first(low, count, 0.0f)).store_first(low, count);
      max(value, Vec::load_first(high, count, 0.0f)).store_first(high, count);
      unusual = unusual + (value - value);
    }
  });
  return all_zero(unusual);
}

template <typename T>
bool min_max_range(const T* x, Layout layout, float* minimum, float* maximum, int64_t begin, int64_t end) {
  if (has_rows(layout)) {
    return min_max_rows(x, layout, minimum, maximum, begin, end);
  }
  Vec unusual(0.0f);
  for_each_run(layout, begin, end, [&](int64_t i, int64_t last, int64_t channel) {
    RunningRange total(minimum[channel], maximum[channel]);
    if (i + 4 * Vec::size <= last) {
      // Four of them hide the latency of min and max.
      RunningRange ranges[4] = {total, total, total, total};
      for (; i + 4 * Vec::size <= last; i += 4 * Vec::size) {
        for (int k = 0; k < 4; ++k) {
          ranges[k].add(Vec::load(x + i + k * Vec::size));
        }
      }
      for (const auto& range : ranges) {
        total.add(range);
      }
    }
    for (; i + Vec::size <= last; i += Vec::size) {
      total.add(Vec::load(x + i));
    }
    if (i < last) {
      total.add(Vec::load_first(x + i, static_cast<int>(last - i), to_float(x[i])));
    }
    unusual = unusual + total.unusual;
    minimum[channel] = least(total.low);
    maximum[channel] = greatest(total.high);
  });
  return all_zero(unusual);
}

}  // namespace

void fake_quantize(const void* x, void* y, uint8_t* mask, Layout layout, Grid grid, bool streaming, int64_t begin,
                   int64_t end) {
  if (mask == nullptr) {
    RAREFY_FOR_FLOAT_TYPE(layout.type, T,
                          fake_quantize_range<T, false>(static_cast<const T*>(x), static_cast<T*>(y), nullptr, layout,
                                                        grid, streaming, begin, end))
  }
  RAREFY_FOR_FLOAT_TYPE(layout.type, T,
                        fake_quantize_range<T, true>(static_cast<const T*>(x), static_cast<T*>(y), mask, layout, grid,
                                                     streaming, begin, end))
}

void quantize(const void* x, uint8_t* y, Layout layout, Grid grid, int64_t begin, int64_t end) {
  RAREFY_FOR_FLOAT_TYPE(layout.type, T, quantize_range(static_cast<const T*>(x), y, layout, grid, begin, end))
}

void mask_gradient(const void* grad, const uint8_t* mask, void* out, int element_bytes, bool streaming, int64_t begin,
                   int64_t end) {
  if (element_bytes == 4) {
    mask_gradient_words<uint32_t>(grad, mask, out, streaming, begin, end);
  } else {
    mask_gradient_words<uint16_t>(grad, mask, out, streaming, begin, end);
  }
}

bool min_max(const void* x, Layout layout, float* minimum, float* maximum, int64_t begin, int64_t end) {
  RAREFY_FOR_FLOAT_TYPE(layout.type, T, min_max_range(static_cast<const T*>(x), layout, minimum, maximum, begin, end))
}

}  // namespace rarefy::cpu::RAREFY_ISA
