#include "ops/cpu/fake_quantize_range_simd.h"

#include "ops/cpu/lane_sum.h"
#include "ops/cpu/simd.h"
#include "ops/cpu/simd_walk.h"

namespace rarefy::cpu::RAREFY_ISA {
namespace {

constexpr int kWord = 64;         // elements whose decisions fit a word
constexpr int64_t kBlock = 1024;  // elements that are added in float32 before float64 takes over
const float kInfinity = bits_to_float(0x7f800000u);

struct Channel {
  Vec scale, low, high, before_low, after_high;

  Channel(Ends ends, int64_t c)
      : scale(ends.scale[c]),
        low(ends.low[c]),
        high(ends.high[c]),
        before_low(ends.before_low[c]),
        after_high(ends.after_high[c]) {}
};

template <typename T>
struct WordOf {
  using type = uint16_t;
};
template <>
struct WordOf<float> {
  using type = uint32_t;
};

/// Moves bits and does no arithmetic: every value comes through as it is, NaN payloads too.
template <typename T>
inline void keep(const T* in, uint64_t inside, T* out, int count) {
#if !defined(RAREFY_ISA_plain)
  if (count == kWord) {
    using Word = typename WordOf<T>::type;
    keep_words<false>(reinterpret_cast<const Word*>(in), inside, reinterpret_cast<Word*>(out));
    return;
  }
#endif
  for (int i = 0; i < count; ++i) out[i] = (inside >> i & 1u) != 0 ? in[i] : T{};
}

struct Sums {
  Lanes rounding, below, above;
};

/// `count` <= kWord elements of one channel; the stretch's sums begin with the first of them at a multiple of kStep.
template <typename T>
inline void word(const T* grad, const T* x, T* out, int count, const Channel& p, Sums& sums) {
  uint64_t all_inside = 0;
  for (int lane = 0; lane < count; lane += Vec::size) {
    const int some = count - lane < Vec::size ? count - lane : Vec::size;
    const Vec g = load_some(grad + lane, some), value = load_some(x + lane, some);
    // min and max give the second operand for a NaN: it counts as neither below nor above, nor within.
    const Vec if_less = min(value, Vec(kInfinity)), if_more = max(value, Vec(-kInfinity));
    const Vec ratio = value / p.scale;
    const Vec product = g * (round_even(ratio) - ratio);
    sums.rounding.add(lane, zero_below(p.high, if_less, zero_below(if_more, p.low, product)));
    sums.below.add(lane, zero_below(p.before_low, if_less, g));
    sums.above.add(lane, zero_below(if_more, p.after_high, g));
    // Lanes beyond `some` hold zeros, and zero gradients: what they add is nothing.
    all_inside |= static_cast<uint64_t>(within(value, p.low, p.high)) << lane;
  }
  keep(grad, all_inside, out, count);
}

template <typename T>
void stretch(const T* grad, const T* x, T* out, const Channel& p, int64_t count, double* sums) {
  for (int64_t block = 0; block < count; block += kBlock) {
    const int64_t end = block + kBlock < count ? block + kBlock : count;
    Sums part;
    for (int64_t i = block; i < end; i += kWord) {
      word(grad + i, x + i, out + i, end - i < kWord ? static_cast<int>(end - i) : kWord, p, part);
    }
    sums[0] += part.rounding.sum();
    sums[1] += part.below.sum();
    sums[2] += part.above.sum();
  }
}

template <typename T>
void gradient(const T* grad, const T* x, T* out, Layout layout, Ends ends, double* sums, int64_t begin, int64_t end) {
  for_each_run(layout, begin, end, [&](int64_t first, int64_t last, int64_t channel) {
    stretch(grad + first, x + first, out + first, Channel(ends, channel), last - first, sums + 3 * channel);
  });
}

}  // namespace

void range_gradient(const void* grad, const void* x, void* out, Layout layout, Ends ends, double* sums, int64_t begin,
                    int64_t end) {
  RAREFY_FOR_FLOAT_TYPE(layout.type, T,
                        gradient(static_cast<const T*>(grad), static_cast<const T*>(x), static_cast<T*>(out), layout,
                                 ends, sums, begin, end))
}

}  // namespace rarefy::cpu::RAREFY_ISA
