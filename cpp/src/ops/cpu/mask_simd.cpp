#include "ops/cpu/mask_simd.h"

#include "ops/cpu/simd.h"

namespace rarefy::cpu::RAREFY_ISA {
namespace {

constexpr int kWord = 64;

// As many keys as a Vec has floats, compared as signed integers.
#if defined(RAREFY_ISA_avx512)

struct Keys {
  __m512i v;

  Keys() = default;
  explicit Keys(int32_t key) : v(_mm512_set1_epi32(key)) {}
  explicit Keys(Vec x) : v(_mm512_and_si512(_mm512_castps_si512(x.v), _mm512_set1_epi32(0x7fffffff))) {}
  static Keys with_sign(Vec x) {
    const __m512i sign = _mm512_srai_epi32(_mm512_castps_si512(x.v), 31);
    Keys out(x);
    out.v = _mm512_sub_epi32(_mm512_xor_si512(out.v, sign), sign);
    return out;
  }
  /// Of every 4 keys, in each place the next one, or the one after it; less 1 where that is an earlier one.
  friend Keys next(Keys a) {
    a.v = _mm512_add_epi32(_mm512_shuffle_epi32(a.v, static_cast<_MM_PERM_ENUM>(0x39)), _mm512_set4_epi32(-1, 0, 0, 0));
    return a;
  }
  friend Keys after_next(Keys a) {
    a.v =
        _mm512_add_epi32(_mm512_shuffle_epi32(a.v, static_cast<_MM_PERM_ENUM>(0x4e)), _mm512_set4_epi32(-1, -1, 0, 0));
    return a;
  }
  friend uint32_t greater(Keys a, Keys b) {
    uint32_t bits = _mm512_cmpgt_epi32_mask(a.v, b.v);
    // To a general register at once: GCC would otherwise join the words with slow mask-register shifts.
    asm("" : "+r"(bits));
    return bits;
  }
  friend Keys larger(Keys a, Keys b) {
    a.v = _mm512_max_epi32(a.v, b.v);
    return a;
  }
  void store(int32_t* p) const { _mm512_storeu_si512(p, v); }
};

#elif defined(RAREFY_ISA_avx2)

struct Keys {
  __m256i v;

  Keys() = default;
  explicit Keys(int32_t key) : v(_mm256_set1_epi32(key)) {}
  explicit Keys(Vec x) : v(_mm256_and_si256(_mm256_castps_si256(x.v), _mm256_set1_epi32(0x7fffffff))) {}
  static Keys with_sign(Vec x) {
    const __m256i sign = _mm256_srai_epi32(_mm256_castps_si256(x.v), 31);
    Keys out(x);
    out.v = _mm256_sub_epi32(_mm256_xor_si256(out.v, sign), sign);
    return out;
  }
  friend Keys next(Keys a) {
    a.v = _mm256_add_epi32(_mm256_shuffle_epi32(a.v, 0x39), _mm256_setr_epi32(0, 0, 0, -1, 0, 0, 0, -1));
    return a;
  }
  friend Keys after_next(Keys a) {
    a.v = _mm256_add_epi32(_mm256_shuffle_epi32(a.v, 0x4e), _mm256_setr_epi32(0, 0, -1, -1, 0, 0, -1, -1));
    return a;
  }
  friend uint32_t greater(Keys a, Keys b) {
    return static_cast<uint32_t>(_mm256_movemask_ps(_mm256_castsi256_ps(_mm256_cmpgt_epi32(a.v, b.v))));
  }
  friend Keys larger(Keys a, Keys b) {
    a.v = _mm256_max_epi32(a.v, b.v);
    return a;
  }
  void store(int32_t* p) const { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), v); }
};

#else

struct Keys {
  int32_t v[Vec::size];

  Keys() = default;
  explicit Keys(int32_t key) {
    for (int32_t& lane : v) lane = key;
  }
  explicit Keys(const Vec& x) {
    for (int i = 0; i < Vec::size; ++i) v[i] = static_cast<int32_t>(float_to_bits(x.v[i]) & 0x7fffffffu);
  }
  static Keys with_sign(const Vec& x) {
    Keys out(x);
    for (int i = 0; i < Vec::size; ++i) out.v[i] = (float_to_bits(x.v[i]) >> 31) != 0 ? -out.v[i] : out.v[i];
    return out;
  }
  friend Keys next(const Keys& a) {
    Keys out;
    for (int i = 0; i < Vec::size; ++i) out.v[i] = i % 4 < 3 ? a.v[i + 1] : a.v[i - 3] - 1;
    return out;
  }
  friend Keys after_next(const Keys& a) {
    Keys out;
    for (int i = 0; i < Vec::size; ++i) out.v[i] = i % 4 < 2 ? a.v[i + 2] : a.v[i - 2] - 1;
    return out;
  }
  friend uint32_t greater(const Keys& a, const Keys& b) {
    uint32_t bits = 0;
    for (int i = 0; i < Vec::size; ++i) bits |= static_cast<uint32_t>(a.v[i] > b.v[i]) << i;
    return bits;
  }
  friend Keys larger(Keys a, const Keys& b) {
    for (int i = 0; i < Vec::size; ++i) a.v[i] = a.v[i] > b.v[i] ? a.v[i] : b.v[i];
    return a;
  }
  void store(int32_t* p) const { memcpy(p, v, sizeof v); }
};

#endif

template <bool Signed>
inline Keys keys_of(const Vec& x) {
  return Signed ? Keys::with_sign(x) : Keys(x);
}

template <bool Signed, typename T>
inline int32_t key_of(T value) {
  const uint32_t bits = float_to_bits(to_float(value));
  const int32_t magnitude = static_cast<int32_t>(bits & 0x7fffffffu);
  return Signed && (bits >> 31) != 0 ? -magnitude : magnitude;
}

inline uint64_t load_word(const uint8_t* mask, int64_t element) {
  uint64_t word;
  memcpy(&word, mask + element / 8, sizeof word);
  return word;
}

/// Calls body(elements, alive, i) for each word of 64 elements from i = begin on. The last, partial word comes as a
/// copy that is filled with zeros, which are not alive.
template <typename T, typename Body>
inline void for_each_word(const T* x, const uint8_t* alive, int64_t begin, int64_t end, Body body) {
  int64_t i = begin;
  for (; i + kWord <= end; i += kWord) {
    body(x + i, alive == nullptr ? ~uint64_t{0} : load_word(alive, i), i);
  }
  if (i < end) {
    T tail[kWord] = {};
    memcpy(tail, x + i, static_cast<size_t>(end - i) * sizeof(T));
    const uint64_t present = (uint64_t{1} << (end - i)) - 1;
    body(static_cast<const T*>(tail), alive == nullptr ? present : load_word(alive, i) & present, i);
  }
}

/// Writes the keys whose bit is set to out, in order, and returns how many.
#if defined(RAREFY_ISA_avx512)
template <bool Signed, typename T>
inline int64_t take(uint64_t bits, const T*, const Keys* keys, int32_t* out) {
  const int32_t* const begin = out;
  // No branch depends on the data: whether a word holds a key of the range is close to a coin toss.
  for (int j = 0; j < kWord / Vec::size; ++j) {
    const auto part = static_cast<__mmask16>(bits >> (j * Vec::size));
    _mm512_storeu_si512(out, _mm512_maskz_compress_epi32(part, keys[j].v));
    out += __builtin_popcount(part);
  }
  return out - begin;
}
#else
template <bool Signed, typename T>
inline int64_t take(uint64_t bits, const T* p, const Keys*, int32_t* out) {
  int64_t count = 0;
  for (; bits != 0; bits &= bits - 1) {
    out[count++] = key_of<Signed>(p[__builtin_ctzll(bits)]);
  }
  return count;
}
#endif

inline int32_t largest_lane(const Keys& keys) {
  int32_t lanes[Vec::size];
  keys.store(lanes);
  int32_t out = 0;
  for (const int32_t lane : lanes) {
    out = lane > out ? lane : out;
  }
  return out;
}

template <bool Signed, typename T>
KeyScan scan_range(const T* x, const uint8_t* alive, int32_t low, int32_t high, int64_t begin, int64_t end,
                   int32_t* inside) {
  KeyScan result = {0, 0, 0};
  const Keys under(low - 1), top(high);
  Keys largest(0);
  for_each_word(x, alive, begin, end, [&](const T* p, uint64_t present, int64_t) {
    uint64_t from_low = 0, above_high = 0;
    Keys keys[kWord / Vec::size];
    for (int j = 0; j < kWord; j += Vec::size) {
      Keys& part = keys[j / Vec::size];
      const Vec x_j = Vec::load(p + j);
      part = keys_of<Signed>(x_j);
      from_low |= static_cast<uint64_t>(greater(part, under)) << j;
      above_high |= static_cast<uint64_t>(greater(part, top)) << j;
      largest = larger(largest, Signed ? Keys(x_j) : part);
    }
    result.below += __builtin_popcountll(present & ~from_low);
    result.inside += take<Signed>(present & from_low & ~above_high, p, keys, inside + result.inside);
  });
  result.largest = largest_lane(largest);
  return result;
}

template <bool Signed, typename T>
int64_t write_range(const T* x, const uint8_t* alive, int32_t threshold, int64_t begin, int64_t end, uint8_t* mask) {
  int64_t ties = 0;
  const Keys at(threshold), under(threshold - 1);
  for_each_word(x, alive, begin, end, [&](const T* p, uint64_t present, int64_t i) {
    uint64_t above = 0, from = 0;
    for (int j = 0; j < kWord; j += Vec::size) {
      const Keys keys = keys_of<Signed>(Vec::load(p + j));
      above |= static_cast<uint64_t>(greater(keys, at)) << j;
      from |= static_cast<uint64_t>(greater(keys, under)) << j;
    }
    ties += __builtin_popcountll(present & from & ~above);
    above &= present;
    memcpy(mask + i / 8, &above, sizeof above);
  });
  return ties;
}

/// An element is kept when it beats 4 - n of the other three of its group. Who beats whom is a total order, since of equal
/// keys the later one wins; so two comparisons, with the next and the one after it, say everything: the element before
/// wins where its own comparison with the next was lost.
template <bool Signed, typename T>
int32_t n_of_4_range(const T* x, int n, int64_t begin, int64_t end, uint8_t* mask) {
  Keys largest(0);
  for_each_word(x, nullptr, begin, end, [&](const T* p, uint64_t present, int64_t i) {
    uint64_t next_loses = 0, after_loses = 0;
    for (int j = 0; j < kWord; j += Vec::size) {
      const Vec x_j = Vec::load(p + j);
      const Keys keys = keys_of<Signed>(x_j);
      next_loses |= static_cast<uint64_t>(greater(keys, next(keys))) << j;
      after_loses |= static_cast<uint64_t>(greater(keys, after_next(keys))) << j;
      largest = larger(largest, Signed ? Keys(x_j) : keys);
    }
    const uint64_t before_wins = (next_loses << 1 & 0xeeeeeeeeeeeeeeeeu) | (next_loses >> 3 & 0x1111111111111111u);
    const uint64_t both = next_loses & after_loses, any = next_loses | after_loses;
    const uint64_t kept = n == 1 ? both & ~before_wins : n == 2 ? both | (any & ~before_wins) : any | ~before_wins;
    const uint64_t word = kept & present;
    memcpy(mask + i / 8, &word, sizeof word);
  });
  return largest_lane(largest);
}

// Clears the elements of one word, from p on, where the bit is 0.
#if defined(RAREFY_ISA_avx512)
inline void apply_word(uint16_t* p, uint64_t word) {
  for (int j = 0; j < kWord; j += 32) {
    _mm512_storeu_si512(p + j, _mm512_maskz_loadu_epi16(static_cast<__mmask32>(word >> j), p + j));
  }
}
inline void apply_word(uint32_t* p, uint64_t word) {
  for (int j = 0; j < kWord; j += 16) {
    _mm512_storeu_si512(p + j, _mm512_maskz_loadu_epi32(static_cast<__mmask16>(word >> j), p + j));
  }
}
inline void apply_word(uint64_t* p, uint64_t word) {
  for (int j = 0; j < kWord; j += 8) {
    _mm512_storeu_si512(p + j, _mm512_maskz_loadu_epi64(static_cast<__mmask8>(word >> j), p + j));
  }
}
#else
/// Written so that the compiler turns each part of a word into vector operations.
template <typename T>
inline void apply_word(T* word_begin, uint64_t word) {
  constexpr int bits = 8 * static_cast<int>(sizeof(T));
  for (int part = 0; part < kWord; part += bits) {
    const T kept = static_cast<T>(word >> part);
    T* p = word_begin + part;
    for (int j = 0; j < bits; ++j) {
      p[j] = static_cast<T>(p[j] & static_cast<T>((kept & static_cast<T>(T{1} << j)) != 0 ? ~T{0} : T{0}));
    }
  }
}
#endif

/// Words are taken in turn from as many stretches of the range as kStreams says. The time is that of reading memory, and one
/// core reads several places at once faster than one place: the hardware prefetches each of them, up to the end of a page.
template <typename T>
void apply_range(T* x, const uint8_t* mask, int64_t begin, int64_t end) {
  constexpr int64_t kStreams = 4;
  const auto apply = [&](int64_t i) {
    const uint64_t word = load_word(mask, i);
    if (word != ~uint64_t{0}) {
      apply_word(x + i, word);
    }
  };
  const int64_t stretch = (end - begin) / (kStreams * kWord) * kWord;
  for (int64_t i = begin; i < begin + stretch; i += kWord) {
    for (int64_t stream = 0; stream < kStreams; ++stream) {
      apply(i + stream * stretch);
    }
  }
  int64_t i = begin + kStreams * stretch;
  for (; i + kWord <= end; i += kWord) {
    apply(i);
  }
  for (; i < end; ++i) {
    if ((mask[i / 8] >> (i % 8) & 1) == 0) {
      x[i] = 0;
    }
  }
}

}  // namespace

KeyScan scan_keys(const void* x, const uint8_t* alive, FloatType type, bool is_signed, int32_t low, int32_t high,
                  int64_t begin, int64_t end, int32_t* inside){
    RAREFY_FOR_FLOAT_TYPE(type, T,
                          is_signed
                              ? scan_range<true>(static_cast<const T*>(x), alive, low, high, begin, end, inside)
                              : scan_range<false>(static_cast<const T*>(x), alive, low, high, begin, end, inside))}

int64_t write_mask(const void* x, const uint8_t* alive, FloatType type, bool is_signed, int32_t threshold,
                   int64_t begin, int64_t end, uint8_t* mask){
    RAREFY_FOR_FLOAT_TYPE(type, T,
                          is_signed ? write_range<true>(static_cast<const T*>(x), alive, threshold, begin, end, mask)
                                    : write_range<false>(static_cast<const T*>(x), alive, threshold, begin, end, mask))}

int32_t write_n_of_4(const void* x, FloatType type, bool is_signed, int n, int64_t begin, int64_t end, uint8_t* mask) {
  RAREFY_FOR_FLOAT_TYPE(type, T,
                        is_signed ? n_of_4_range<true>(static_cast<const T*>(x), n, begin, end, mask)
                                  : n_of_4_range<false>(static_cast<const T*>(x), n, begin, end, mask))
}

void apply_mask(void* x, const uint8_t* mask, int element_bytes, int64_t begin, int64_t end) {
  switch (element_bytes) {
    case 2:
      return apply_range(static_cast<uint16_t*>(x), mask, begin, end);
    case 4:
      return apply_range(static_cast<uint32_t*>(x), mask, begin, end);
    default:
      return apply_range(static_cast<uint64_t*>(x), mask, begin, end);
  }
}

}  // namespace rarefy::cpu::RAREFY_ISA
