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

template <typename T>
inline int32_t key_of(T value) {
  return static_cast<int32_t>(float_to_bits(to_float(value)) & 0x7fffffffu);
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
template <typename T>
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
template <typename T>
inline int64_t take(uint64_t bits, const T* p, const Keys*, int32_t* out) {
  int64_t count = 0;
  for (; bits != 0; bits &= bits - 1) {
    out[count++] = key_of(p[__builtin_ctzll(bits)]);
  }
  return count;
}
#endif

template <typename T>
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
      part = Keys(Vec::load(p + j));
      from_low |= static_cast<uint64_t>(greater(part, under)) << j;
      above_high |= static_cast<uint64_t>(greater(part, top)) << j;
      largest = larger(largest, part);
    }
    result.below += __builtin_popcountll(present & ~from_low);
    result.inside += take(present & from_low & ~above_high, p, keys, inside + result.inside);
  });
  int32_t lanes[Vec::size];
  largest.store(lanes);
  for (const int32_t lane : lanes) {
    result.largest = lane > result.largest ? lane : result.largest;
  }
  return result;
}

template <typename T>
int64_t write_range(const T* x, const uint8_t* alive, int32_t threshold, int64_t begin, int64_t end, uint8_t* mask) {
  int64_t ties = 0;
  const Keys at(threshold), under(threshold - 1);
  for_each_word(x, alive, begin, end, [&](const T* p, uint64_t present, int64_t i) {
    uint64_t above = 0, from = 0;
    for (int j = 0; j < kWord; j += Vec::size) {
      const Keys keys(Vec::load(p + j));
      above |= static_cast<uint64_t>(greater(keys, at)) << j;
      from |= static_cast<uint64_t>(greater(keys, under)) << j;
    }
    ties += __builtin_popcountll(present & from & ~above);
    above &= present;
    memcpy(mask + i / 8, &above, sizeof above);
  });
  return ties;
}

/// Clears elements where the bit is 0. Written so that the compiler turns each half word into vector operations.
template <typename T>
void apply_range(T* x, const uint8_t* mask, int64_t begin, int64_t end) {
  constexpr int bits = 8 * static_cast<int>(sizeof(T));
  int64_t i = begin;
  for (; i + kWord <= end; i += kWord) {
    const uint64_t word = load_word(mask, i);
    if (word == ~uint64_t{0}) {
      continue;
    }
    for (int part = 0; part < kWord; part += bits) {
      const T kept = static_cast<T>(word >> part);
      T* p = x + i + part;
      for (int j = 0; j < bits; ++j) {
        p[j] = static_cast<T>(p[j] & static_cast<T>((kept & static_cast<T>(T{1} << j)) != 0 ? ~T{0} : T{0}));
      }
    }
  }
  for (; i < end; ++i) {
    if ((mask[i / 8] >> (i % 8) & 1) == 0) {
      x[i] = 0;
    }
  }
}

}  // namespace

KeyScan scan_keys(const void* x, const uint8_t* alive, FloatType type, int32_t low, int32_t high, int64_t begin,
                  int64_t end, int32_t* inside){
    RAREFY_FOR_FLOAT_TYPE(type, T, scan_range(static_cast<const T*>(x), alive, low, high, begin, end, inside))}

int64_t write_mask(const void* x, const uint8_t* alive, FloatType type, int32_t threshold, int64_t begin, int64_t end,
                   uint8_t* mask) {
  RAREFY_FOR_FLOAT_TYPE(type, T, write_range(static_cast<const T*>(x), alive, threshold, begin, end, mask))
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
