#include "ops/cpu/fake_quantize_learned_simd.h"

#include "ops/cpu/lane_sum.h"
#include "ops/cpu/simd.h"
#include "ops/cpu/simd_walk.h"

namespace rarefy::cpu::RAREFY_ISA {
namespace {

constexpr int kWord = 64;              // elements whose decisions fit a word
constexpr int64_t kBlock = 1024;       // elements that are added in float32 before float64 takes over
constexpr int kRows = 64;              // the same for rows
constexpr float kFarBelow = -0x1p20f;  // below every index of a grid, and every difference of two

struct Decided {
  Vec product;      // grad * t
  uint32_t inside;  // bit i: lane i was not clamped
};

inline Decided decide(Vec grad, Vec x, const Parameters& p) {
  const Vec ratio = x / p.scale;
  const Vec q = round_even(ratio) + p.zero_point;
  const Vec steps = clamp(q, p) - p.zero_point;
  // Inside the range steps is round_even(ratio), exactly, and ratio is subtracted; beyond it nothing is.
  const Vec kept = zero_below(p.qmax, q, zero_below(q, p.qmin, ratio));
  const Vec product = grad * (steps - kept);
  // max(NaN, low) is low: a NaN in x falls below the threshold, and no number does.
  const Vec number = max(steps, Vec(2.0f * kFarBelow));
  return {zero_below(number, Vec(kFarBelow), product), within(q, p.qmin, p.qmax)};
}

template <typename T>
struct WordOf {
  using type = uint16_t;
};
template <>
struct WordOf<float> {
  using type = uint32_t;
};

/// Moves bits and does no arithmetic: every value comes through as it is, NaN payloads too.
template <bool Streaming, typename T>
inline void keep(const T* in, uint64_t inside, T* out, int count) {
#if !defined(RAREFY_ISA_plain)
  if (count == kWord) {
    using Word = typename WordOf<T>::type;
    keep_words<Streaming>(reinterpret_cast<const Word*>(in), inside, reinterpret_cast<Word*>(out));
    return;
  }
#endif
  for (int i = 0; i < count; ++i) out[i] = (inside >> i & 1u) != 0 ? in[i] : T{};
}

template <typename T>
struct Gradient {
  const T* grad;
  const T* x;
  T* out;

  /// `count` <= kWord elements from element i, all of one channel.
  template <bool Streaming>
  void run(int64_t i, int count, const Parameters& p, Lanes& lanes) const {
    uint64_t inside = 0;
    for (int lane = 0; lane < count; lane += Vec::size) {
      const int some = count - lane < Vec::size ? count - lane : Vec::size;
      const auto decided = decide(load_some(grad + i + lane, some), load_some(x + i + lane, some), p);
      lanes.add(lane, decided.product);
      inside |= static_cast<uint64_t>(decided.inside) << lane;
    }
    keep<Streaming>(grad + i, inside, out + i, count);
  }

  /// The same with channels channel, channel + 1, ..., and a sum for each.
  template <bool Streaming>
  void row(int64_t i, int64_t channel, int count, Grid grid, Parameters& p, float* columns) const {
    uint64_t inside = 0;
    for (int lane = 0; lane < count; lane += Vec::size) {
      const int some = count - lane < Vec::size ? count - lane : Vec::size;
      p.load(grid, channel + lane, some);
      const auto decided = decide(load_some(grad + i + lane, some), load_some(x + i + lane, some), p);
      float* column = columns + channel + lane;
      store_some(load_some(static_cast<const float*>(column), some) + decided.product, column, some);
      inside |= static_cast<uint64_t>(decided.inside) << lane;
    }
    keep<Streaming>(grad + i, inside, out + i, count);
  }

  bool is_aligned(int64_t i) const { return reinterpret_cast<uintptr_t>(out + i) % kStreamAlignment == 0; }
};

inline void empty_columns(float* columns, double* sums, int64_t channels) {
  for (int64_t c = 0; c < channels; ++c) {
    sums[c] += static_cast<double>(columns[c]);
    columns[c] = 0.0f;
  }
}

template <typename T>
void learned_rows(Gradient<T> gradient, Layout layout, Grid grid, bool streaming, double* sums, float* columns,
                  int64_t begin, int64_t end) {
  Parameters p(grid);
  int rows = 0;
  for (int64_t i = begin; i < end;) {
    int64_t channel = i % layout.channels;
    const int64_t row_end = i + (layout.channels - channel) < end ? i + (layout.channels - channel) : end;
    const bool streams = streaming && gradient.is_aligned(i);
    while (i < row_end) {
      const int count = row_end - i < kWord ? static_cast<int>(row_end - i) : kWord;
      streams ? gradient.template row<true>(i, channel, count, grid, p, columns)
              : gradient.template row<false>(i, channel, count, grid, p, columns);
      i += count;
      channel += count;
    }
    if (++rows == kRows) {
      empty_columns(columns, sums, layout.channels);
      rows = 0;
    }
  }
  empty_columns(columns, sums, layout.channels);
}

template <typename T>
void learned_runs(Gradient<T> gradient, Layout layout, Grid grid, bool streaming, double* sums, int64_t begin,
                  int64_t end) {
  Parameters p(grid);
  for_each_run(layout, begin, end, [&](int64_t i, int64_t last, int64_t channel) {
    p.set(grid, channel);
    const bool streams = streaming && gradient.is_aligned(i);
    double total = 0.0;
    while (i < last) {
      const int64_t block_end = last - i < kBlock ? last : i + kBlock;
      Lanes lanes;
      for (; i + kWord <= block_end; i += kWord) {
        streams ? gradient.template run<true>(i, kWord, p, lanes) : gradient.template run<false>(i, kWord, p, lanes);
      }
      if (i < block_end) {
        gradient.template run<false>(i, static_cast<int>(block_end - i), p, lanes);
        i = block_end;
      }
      total += lanes.sum();
    }
    sums[channel] += total;
  });
}

template <typename T>
void learned_range(Gradient<T> gradient, Layout layout, Grid grid, bool streaming, double* sums, float* columns,
                   int64_t begin, int64_t end) {
  if (sums_by_row(layout)) {
    learned_rows(gradient, layout, grid, streaming, sums, columns, begin, end);
  } else {
    learned_runs(gradient, layout, grid, streaming, sums, begin, end);
  }
  if (streaming) {
    stream_fence();
  }
}

}  // namespace

void learned_gradient(const void* grad, const void* x, void* out, Layout layout, Grid grid, bool streaming,
                      double* sums, float* columns, int64_t begin, int64_t end) {
  RAREFY_FOR_FLOAT_TYPE(layout.type, T,
                        learned_range<T>({static_cast<const T*>(grad), static_cast<const T*>(x), static_cast<T*>(out)},
                                         layout, grid, streaming, sums, columns, begin, end))
}

}  // namespace rarefy::cpu::RAREFY_ISA
