#include "ops/cpu/fake_quantize_simd.h"

#include "ops/cpu/simd.h"

namespace rarefy::cpu::RAREFY_ISA {
namespace {

constexpr float kLargest = 3.402823466e38f;

/// Appends bits and writes them out 64 at a time; a range starts on a whole 64-bit word.
class BitWriter {
 public:
  explicit BitWriter(uint8_t* out) : out_(out) {}

  void push(uint32_t bits, int count) {
    word_ |= static_cast<uint64_t>(bits) << fill_;
    fill_ += count;
    if (fill_ >= 64) {
      memcpy(out_, &word_, 8);
      out_ += 8;
      fill_ -= 64;
      word_ = fill_ == 0 ? 0 : static_cast<uint64_t>(bits) >> (count - fill_);
    }
  }
  void finish() {
    for (; fill_ > 0; fill_ -= 8, word_ >>= 8) {
      *out_++ = static_cast<uint8_t>(word_);
    }
  }

 private:
  uint8_t* out_;
  uint64_t word_ = 0;
  int fill_ = 0;
};

struct Parameters {
  Vec scale, zero_point, qmin, qmax;
};

inline Vec to_grid(Vec x, const Parameters& p) { return round_even(x / p.scale) + p.zero_point; }
// The bounds come first: max(low, NaN) is NaN, so that a NaN stays visible in simulated execution.
inline Vec clamp(Vec q, const Parameters& p) { return min(p.qmax, max(p.qmin, q)); }

/// Calls body(offset, count, parameters) over [begin, end) in steps of at most Vec::size elements that share one vector
/// of parameters. Steps run in order.
template <typename Body>
inline void for_each_vector(Layout layout, Grid grid, int64_t begin, int64_t end, Body body) {
  Parameters p;
  p.qmin = Vec(grid.qmin);
  p.qmax = Vec(grid.qmax);
  if (layout.inner == 1 && layout.channels >= Vec::size) {
    // The channel is the fastest axis (channels-last): parameters come as vectors.
    for (int64_t i = begin; i < end;) {
      const int64_t channel = i % layout.channels;
      const int64_t row_end = i + (layout.channels - channel) < end ? i + (layout.channels - channel) : end;
      const float* scale = grid.scale + channel;
      const float* zero_point = grid.zero_point + channel;
      for (; i + Vec::size <= row_end; i += Vec::size, scale += Vec::size, zero_point += Vec::size) {
        p.scale = Vec::load(scale);
        p.zero_point = Vec::load(zero_point);
        body(i, Vec::size, p);
      }
      if (i < row_end) {
        p.scale = load_tail(scale, row_end - i, 1.0f);
        p.zero_point = load_tail(zero_point, row_end - i, 0.0f);
        body(i, static_cast<int>(row_end - i), p);
        i = row_end;
      }
    }
    return;
  }
  for (int64_t i = begin; i < end;) {
    const int64_t block = i / layout.inner;
    const int64_t block_end = (block + 1) * layout.inner < end ? (block + 1) * layout.inner : end;
    const int64_t channel = block % layout.channels;
    p.scale = Vec(grid.scale[channel]);
    p.zero_point = Vec(grid.zero_point[channel]);
    for (; i + Vec::size <= block_end; i += Vec::size) {
      body(i, Vec::size, p);
    }
    if (i < block_end) {
      body(i, static_cast<int>(block_end - i), p);
      i = block_end;
    }
  }
}

template <typename T>
void fake_quantize_range(const T* x, T* y, uint8_t* mask, Layout layout, Grid grid, int64_t begin, int64_t end) {
  if (mask == nullptr) {
    for_each_vector(layout, grid, begin, end, [&](int64_t i, int count, const Parameters& p) {
      const Vec value = count == Vec::size ? Vec::load(x + i) : load_tail(x + i, count, 0.0f);
      const Vec out = (clamp(to_grid(value, p), p) - p.zero_point) * p.scale;
      count == Vec::size ? out.store(y + i) : store_tail(out, y + i, count);
    });
    return;
  }
  BitWriter bits(mask + begin / 8);
  for_each_vector(layout, grid, begin, end, [&](int64_t i, int count, const Parameters& p) {
    const Vec value = count == Vec::size ? Vec::load(x + i) : load_tail(x + i, count, 0.0f);
    const Vec q = to_grid(value, p);
    const Vec out = (clamp(q, p) - p.zero_point) * p.scale;
    const uint32_t inside = within(q, p.qmin, p.qmax);
    if (count == Vec::size) {
      out.store(y + i);
      bits.push(inside, Vec::size);
    } else {
      store_tail(out, y + i, count);
      bits.push(inside & ((1u << count) - 1u), count);
    }
  });
  bits.finish();
}

template <typename T>
void quantize_range(const T* x, uint8_t* y, Layout layout, Grid grid, int64_t begin, int64_t end) {
  for_each_vector(layout, grid, begin, end, [&](int64_t i, int count, const Parameters& p) {
    const Vec value = count == Vec::size ? Vec::load(x + i) : load_tail(x + i, count, 0.0f);
    const Vec q = to_grid(value, p);
    // An integer has no NaN: min(q, qmax) with the bound second turns it into qmax.
    const Vec clamped = max(p.qmin, min(q, p.qmax));
    count == Vec::size ? clamped.store_bytes(y + i) : store_bytes_tail(clamped, y + i, count);
  });
}

template <typename T>
void mask_gradient_range(const T* grad, const uint8_t* mask, T* out, int64_t begin, int64_t end) {
  int64_t i = begin;
  for (; i + 16 <= end; i += 16) {
    uint32_t bits = mask[i / 8] | static_cast<uint32_t>(mask[i / 8 + 1]) << 8;
    for (int lane = 0; lane < 16; lane += Vec::size, bits >>= Vec::size % 32) {
      keep(bits & ((1u << Vec::size) - 1u), Vec::load(grad + i + lane)).store(out + i + lane);
    }
  }
  for (; i < end; ++i) {
    from_float((mask[i / 8] >> (i % 8) & 1) != 0 ? to_float(grad[i]) : 0.0f, out + i);
  }
}

template <typename T>
bool min_max_range(const T* x, Layout layout, float* minimum, float* maximum, int64_t begin, int64_t end) {
  bool finite = true;
  const Vec lowest(-kLargest), largest(kLargest);
  if (layout.inner == 1 && layout.channels >= Vec::size) {
    for (int64_t i = begin; i < end;) {
      const int64_t channel = i % layout.channels;
      const int64_t row_end = i + (layout.channels - channel) < end ? i + (layout.channels - channel) : end;
      float* low = minimum + channel;
      float* high = maximum + channel;
      for (; i + Vec::size <= row_end; i += Vec::size, low += Vec::size, high += Vec::size) {
        const Vec value = Vec::load(x + i);
        finite = finite && within(value, lowest, largest) == (1u << Vec::size) - 1u;
        min(value, Vec::load(low)).store(low);
        max(value, Vec::load(high)).store(high);
      }
      for (; i < row_end; ++i, ++low, ++high) {
        const float value = to_float(x[i]);
        finite = finite && value >= -kLargest && value <= kLargest;
        *low = value < *low ? value : *low;
        *high = value > *high ? value : *high;
      }
    }
    return finite;
  }
  for (int64_t i = begin; i < end;) {
    const int64_t block = i / layout.inner;
    const int64_t block_end = (block + 1) * layout.inner < end ? (block + 1) * layout.inner : end;
    const int64_t channel = block % layout.channels;
    float low = minimum[channel], high = maximum[channel];
    // Four accumulators hide the latency of min and max; x - x is 0 for finite values and NaN otherwise, and sticks.
    Vec lows[4], highs[4], unusual[4];
    for (int k = 0; k < 4; ++k) {
      lows[k] = Vec(low);
      highs[k] = Vec(high);
      unusual[k] = Vec(0.0f);
    }
    for (; i + 4 * Vec::size <= block_end; i += 4 * Vec::size) {
      for (int k = 0; k < 4; ++k) {
        const Vec value = Vec::load(x + i + k * Vec::size);
        lows[k] = min(value, lows[k]);
        highs[k] = max(value, highs[k]);
        unusual[k] = unusual[k] + (value - value);
      }
    }
    const Vec sticky = (unusual[0] + unusual[1]) + (unusual[2] + unusual[3]);
    finite = finite && within(sticky, Vec(0.0f), Vec(0.0f)) == (1u << Vec::size) - 1u;
    float lanes_low[Vec::size], lanes_high[Vec::size];
    min(min(lows[0], lows[1]), min(lows[2], lows[3])).store(static_cast<float*>(lanes_low));
    max(max(highs[0], highs[1]), max(highs[2], highs[3])).store(static_cast<float*>(lanes_high));
    for (int k = 0; k < Vec::size; ++k) {
      low = lanes_low[k] < low ? lanes_low[k] : low;
      high = lanes_high[k] > high ? lanes_high[k] : high;
    }
    for (; i < block_end; ++i) {
      const float value = to_float(x[i]);
      finite = finite && value >= -kLargest && value <= kLargest;
      low = value < low ? value : low;
      high = value > high ? value : high;
    }
    minimum[channel] = low;
    maximum[channel] = high;
  }
  return finite;
}

}  // namespace

void fake_quantize(const void* x, void* y, uint8_t* mask, Layout layout, Grid grid, int64_t begin, int64_t end) {
  RAREFY_FOR_FLOAT_TYPE(layout.type, T,
                        fake_quantize_range(static_cast<const T*>(x), static_cast<T*>(y), mask, layout, grid, begin, end))
}

void quantize(const void* x, uint8_t* y, Layout layout, Grid grid, int64_t begin, int64_t end) {
  RAREFY_FOR_FLOAT_TYPE(layout.type, T, quantize_range(static_cast<const T*>(x), y, layout, grid, begin, end))
}

void mask_gradient(const void* grad, const uint8_t* mask, void* out, FloatType type, int64_t begin, int64_t end) {
  RAREFY_FOR_FLOAT_TYPE(type, T,
                        mask_gradient_range(static_cast<const T*>(grad), mask, static_cast<T*>(out), begin, end))
}

bool min_max(const void* x, Layout layout, float* minimum, float* maximum, int64_t begin, int64_t end) {
  RAREFY_FOR_FLOAT_TYPE(layout.type, T,
                        min_max_range(static_cast<const T*>(x), layout, minimum, maximum, begin, end))
}

}  // namespace rarefy::cpu::RAREFY_ISA
