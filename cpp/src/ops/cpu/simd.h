// One vector of floats in the instruction set that RAREFY_ISA names, and the loads and stores that kernels need.
// Only for files that cmake/RarefyIsa.cmake compiles. Every operation gives the same bits in every instruction set.
#pragma once

#if !defined(RAREFY_ISA)
#error "simd.h is for files compiled by rarefy_add_isa_sources"
#endif

#include <stdint.h>
#include <string.h>
#if !defined(RAREFY_ISA_plain)
#include <immintrin.h>
#endif

namespace rarefy::cpu::RAREFY_ISA {

struct Bf16 {
  uint16_t bits;
};
struct Half {
  uint16_t bits;
};

// --- Scalar conversions, shared by the plain vector and by tails ---------------------------------------------------
inline float bits_to_float(uint32_t bits) {
  float value;
  memcpy(&value, &bits, sizeof value);
  return value;
}
inline uint32_t float_to_bits(float value) {
  uint32_t bits;
  memcpy(&bits, &value, sizeof bits);
  return bits;
}
inline float to_float(float value) { return value; }
inline float to_float(Bf16 value) { return bits_to_float(static_cast<uint32_t>(value.bits) << 16); }
inline float to_float(Half value) {
  const uint32_t sign = static_cast<uint32_t>(value.bits & 0x8000u) << 16;
  const uint32_t magnitude = value.bits & 0x7fffu;
  if (magnitude >= 0x7c00u) {  // infinity or NaN
    return bits_to_float(sign | 0x7f800000u | (magnitude & 0x3ffu) << 13);
  }
  if (magnitude < 0x400u) {  // zero or denormal: magnitude * 2^-24, exact in float
    const float positive = static_cast<float>(magnitude) * 5.9604644775390625e-8f;
    return bits_to_float(sign | float_to_bits(positive));
  }
  return bits_to_float(sign | ((magnitude << 13) + 0x38000000u));
}
inline void from_float(float value, float* out) { *out = value; }
inline void from_float(float value, Bf16* out) {
  const uint32_t bits = float_to_bits(value);
  const bool is_nan = (bits & 0x7fffffffu) > 0x7f800000u;
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  out->bits = is_nan ? static_cast<uint16_t>(0x7fc0u) : static_cast<uint16_t>(rounded);
}
inline void from_float(float value, Half* out) {
  const uint32_t bits = float_to_bits(value);
  const uint16_t sign = static_cast<uint16_t>((bits >> 16) & 0x8000u);
  const uint32_t magnitude = bits & 0x7fffffffu;
  if (magnitude > 0x7f800000u) {
    out->bits = static_cast<uint16_t>(sign | 0x7e00u);
  } else if (magnitude >= 0x477ff000u) {  // rounds to 65536 or more
    out->bits = static_cast<uint16_t>(sign | 0x7c00u);
  } else if (magnitude < 0x38800000u) {  // below 2^-14: count units of 2^-24, rounded by the float adder
    const float shifted = bits_to_float(magnitude) + 0.5f;  // the unit of 0.5f is 2^-24
    out->bits = static_cast<uint16_t>(sign | (float_to_bits(shifted) - float_to_bits(0.5f)));
  } else {
    out->bits = static_cast<uint16_t>(sign | ((magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1u)) >> 13));
  }
}
/// Nearest integer, ties to even, for any float; NaN and infinity pass through.
inline float round_even_scalar(float value) {
  const float magnitude = bits_to_float(float_to_bits(value) & 0x7fffffffu);
  if (!(magnitude < 8388608.0f)) {
    return value;
  }
  const float rounded = (magnitude + 8388608.0f) - 8388608.0f;
  return bits_to_float(float_to_bits(rounded) | (float_to_bits(value) & 0x80000000u));
}

// The bits of 2^(k/8) below the exponent, less k << 20, for exp2_eighths.
alignas(32) constexpr int32_t kExp2Eighths[8] = {0, -0x46a3e, -0x7c810, -0xa0129, -0xafb0d, -0xa98d6, -0x8bb03, -0x53f39};

#if defined(RAREFY_ISA_avx512)

struct Vec {
  static constexpr int size = 16;
  __m512 v;

  Vec() = default;
  Vec(__m512 value) : v(value) {}
  explicit Vec(float value) : v(_mm512_set1_ps(value)) {}

  static Vec load(const float* p) { return _mm512_loadu_ps(p); }
  static Vec load(const Bf16* p) {
    const __m256i raw = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(raw), 16));
  }
  static Vec load(const Half* p) { return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))); }
  void store(float* p) const { _mm512_storeu_ps(p, v); }
  void store(Bf16* p) const {
    const __m512i bits = _mm512_castps_si512(v);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    __m512i rounded = _mm512_srli_epi32(_mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff))), 16);
    const __mmask16 nan = _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
    rounded = _mm512_mask_mov_epi32(rounded, nan, _mm512_set1_epi32(0x7fc0));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi32_epi16(rounded));
  }
  void store(Half* p) const {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
  }
  /// Lowest byte of each value as an integer; the values are whole and within -128..255.
  void store_bytes(uint8_t* p) const {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtepi32_epi8(_mm512_cvtps_epi32(v)));
  }

  friend Vec operator+(Vec a, Vec b) { return _mm512_add_ps(a.v, b.v); }
  friend Vec operator-(Vec a, Vec b) { return _mm512_sub_ps(a.v, b.v); }
  friend Vec operator*(Vec a, Vec b) { return _mm512_mul_ps(a.v, b.v); }
  friend Vec operator/(Vec a, Vec b) { return _mm512_div_ps(a.v, b.v); }
  /// min and max return b when either operand is NaN.
  friend Vec min(Vec a, Vec b) { return _mm512_min_ps(a.v, b.v); }
  friend Vec max(Vec a, Vec b) { return _mm512_max_ps(a.v, b.v); }
  friend Vec round_even(Vec a) {
    return _mm512_roundscale_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  }
  /// Bit i is set when low <= a[i] <= high; false for NaN.
  friend uint32_t within(Vec a, Vec low, Vec high) {
    const __mmask16 above = _mm512_cmp_ps_mask(a.v, low.v, _CMP_GE_OQ);
    return _mm512_mask_cmp_ps_mask(above, a.v, high.v, _CMP_LE_OQ);
  }
  /// a where the bit is set, 0 elsewhere.
  friend Vec keep(uint32_t bits, Vec a) { return _mm512_maskz_mov_ps(static_cast<__mmask16>(bits), a.v); }
  /// 0 where a < low, value elsewhere (also where a is NaN).
  friend Vec zero_below(Vec a, Vec low, Vec value) {
    return _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(a.v, low.v, _CMP_NLT_UQ), value.v);
  }
  /// 2^(n + k/8), where the low bits of a's mantissa hold (n + 127) * 8 + k.
  friend Vec exp2_eighths(Vec a) {
    const __m512i table = _mm512_broadcast_i32x8(_mm256_load_si256(reinterpret_cast<const __m256i*>(kExp2Eighths)));
    const __m512i bits = _mm512_castps_si512(a.v);
    return _mm512_castsi512_ps(_mm512_add_epi32(_mm512_slli_epi32(bits, 20), _mm512_permutexvar_epi32(bits, table)));
  }
};

#elif defined(RAREFY_ISA_avx2)

struct Vec {
  static constexpr int size = 8;
  __m256 v;

  Vec() = default;
  Vec(__m256 value) : v(value) {}
  explicit Vec(float value) : v(_mm256_set1_ps(value)) {}

  static Vec load(const float* p) { return _mm256_loadu_ps(p); }
  static Vec load(const Bf16* p) {
    const __m128i raw = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(raw), 16));
  }
  static Vec load(const Half* p) { return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))); }
  void store(float* p) const { _mm256_storeu_ps(p, v); }
  void store(Bf16* p) const {
    const __m256i bits = _mm256_castps_si256(v);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    __m256i rounded = _mm256_srli_epi32(_mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff))), 16);
    const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(v, v, _CMP_UNORD_Q));
    rounded = _mm256_blendv_epi8(rounded, _mm256_set1_epi32(0x7fc0), nan);
    const __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(rounded, rounded), 0x08);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_castsi256_si128(packed));
  }
  void store(Half* p) const {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
  }
  void store_bytes(uint8_t* p) const {
    const __m256i whole = _mm256_and_si256(_mm256_cvtps_epi32(v), _mm256_set1_epi32(0xff));
    const __m256i words = _mm256_permute4x64_epi64(_mm256_packus_epi32(whole, whole), 0x08);
    const __m128i bytes = _mm_packus_epi16(_mm256_castsi256_si128(words), _mm256_castsi256_si128(words));
    _mm_storel_epi64(reinterpret_cast<__m128i*>(p), bytes);
  }

  friend Vec operator+(Vec a, Vec b) { return _mm256_add_ps(a.v, b.v); }
  friend Vec operator-(Vec a, Vec b) { return _mm256_sub_ps(a.v, b.v); }
  friend Vec operator*(Vec a, Vec b) { return _mm256_mul_ps(a.v, b.v); }
  friend Vec operator/(Vec a, Vec b) { return _mm256_div_ps(a.v, b.v); }
  friend Vec min(Vec a, Vec b) { return _mm256_min_ps(a.v, b.v); }
  friend Vec max(Vec a, Vec b) { return _mm256_max_ps(a.v, b.v); }
  friend Vec round_even(Vec a) { return _mm256_round_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
  friend uint32_t within(Vec a, Vec low, Vec high) {
    return static_cast<uint32_t>(_mm256_movemask_ps(
        _mm256_and_ps(_mm256_cmp_ps(a.v, low.v, _CMP_GE_OQ), _mm256_cmp_ps(a.v, high.v, _CMP_LE_OQ))));
  }
  friend Vec keep(uint32_t bits, Vec a) {
    const __m256i lanes = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
    const __m256i set = _mm256_and_si256(_mm256_set1_epi32(static_cast<int>(bits)), lanes);
    return _mm256_and_ps(a.v, _mm256_castsi256_ps(_mm256_cmpeq_epi32(set, lanes)));
  }
  friend Vec zero_below(Vec a, Vec low, Vec value) {
    return _mm256_and_ps(value.v, _mm256_cmp_ps(a.v, low.v, _CMP_NLT_UQ));
  }
  friend Vec exp2_eighths(Vec a) {
    const __m256i table = _mm256_load_si256(reinterpret_cast<const __m256i*>(kExp2Eighths));
    const __m256i bits = _mm256_castps_si256(a.v);
    return _mm256_castsi256_ps(_mm256_add_epi32(_mm256_slli_epi32(bits, 20), _mm256_permutevar8x32_epi32(table, bits)));
  }
};

#else

struct Vec {
  static constexpr int size = 8;
  float v[size];

  Vec() = default;
  explicit Vec(float value) {
    for (float& lane : v) lane = value;
  }
  template <typename T>
  static Vec load(const T* p) {
    Vec out;
    for (int i = 0; i < size; ++i) out.v[i] = to_float(p[i]);
    return out;
  }
  template <typename T>
  void store(T* p) const {
    for (int i = 0; i < size; ++i) from_float(v[i], p + i);
  }
  void store_bytes(uint8_t* p) const {
    for (int i = 0; i < size; ++i) p[i] = static_cast<uint8_t>(static_cast<int32_t>(v[i]));
  }

#define RAREFY_LANES(expression)                       \
  Vec out;                                             \
  for (int i = 0; i < size; ++i) out.v[i] = expression; \
  return out;
  friend Vec operator+(Vec a, Vec b) { RAREFY_LANES(a.v[i] + b.v[i]) }
  friend Vec operator-(Vec a, Vec b) { RAREFY_LANES(a.v[i] - b.v[i]) }
  friend Vec operator*(Vec a, Vec b) { RAREFY_LANES(a.v[i] * b.v[i]) }
  friend Vec operator/(Vec a, Vec b) { RAREFY_LANES(a.v[i] / b.v[i]) }
  friend Vec min(Vec a, Vec b) { RAREFY_LANES(a.v[i] < b.v[i] ? a.v[i] : b.v[i]) }
  friend Vec max(Vec a, Vec b) { RAREFY_LANES(a.v[i] > b.v[i] ? a.v[i] : b.v[i]) }
  friend Vec round_even(Vec a) { RAREFY_LANES(round_even_scalar(a.v[i])) }
  friend uint32_t within(Vec a, Vec low, Vec high) {
    uint32_t bits = 0;
    for (int i = 0; i < size; ++i) bits |= static_cast<uint32_t>(a.v[i] >= low.v[i] && a.v[i] <= high.v[i]) << i;
    return bits;
  }
  friend Vec keep(uint32_t bits, Vec a) { RAREFY_LANES((bits >> i & 1u) != 0 ? a.v[i] : 0.0f) }
  friend Vec zero_below(Vec a, Vec low, Vec value) { RAREFY_LANES(a.v[i] < low.v[i] ? 0.0f : value.v[i]) }
  friend Vec exp2_eighths(Vec a) {
    RAREFY_LANES(bits_to_float((float_to_bits(a.v[i]) << 20) +
                               static_cast<uint32_t>(kExp2Eighths[float_to_bits(a.v[i]) & 7u])))
  }
#undef RAREFY_LANES
};

#endif

/// 2^x for -126 <= x <= 0, within 1.5 ulp; exactly 1 at 0, NaN for NaN.
///
/// x = n + k / 8 + f with k in 0..7 and |f| <= 1/16, and 2^x = 2^n 2^(k/8) 2^f. Adding 1.5 * 2^20 + 127 rounds to a multiple
/// of 1/8 and leaves n + 127 and k in the low bits of the sum. The polynomial for (2^f - 1) / f is the minimax one of the
/// relative error of 2^f: 2.7e-8.
inline Vec exp2_bounded(Vec x) {
  const Vec shifter(1572991.0f);  // 1.5 * 2^20 + 127
  const Vec shifted = x + shifter;
  const Vec f = x - (shifted - shifter);
  const Vec p = ((Vec(5.549621955e-2f) * f + Vec(2.402576357e-1f)) * f + Vec(6.931472421e-1f)) * f;
  const Vec scale = exp2_eighths(shifted);
  return scale * p + scale;
}

/// 2^x for x <= 0: as exp2_bounded, and 0 where x < -126 (the result would be below the smallest normal float).
inline Vec exp2_nonpositive(Vec x) {
  const Vec lowest(-126.0f);
  return zero_below(x, lowest, exp2_bounded(max(lowest, x)));  // max keeps NaN
}

/// The first n < Vec::size values at p; the other lanes repeat `fill`.
template <typename T>
inline Vec load_tail(const T* p, int64_t n, float fill) {
  float lanes[Vec::size];
  for (int i = 0; i < Vec::size; ++i) lanes[i] = i < n ? to_float(p[i]) : fill;
  return Vec::load(static_cast<const float*>(lanes));
}
/// The first n < Vec::size lanes to p.
template <typename T>
inline void store_tail(Vec value, T* p, int64_t n) {
  float lanes[Vec::size];
  value.store(static_cast<float*>(lanes));
  for (int64_t i = 0; i < n; ++i) from_float(lanes[i], p + i);
}
inline void store_bytes_tail(Vec value, uint8_t* p, int64_t n) {
  uint8_t lanes[Vec::size];
  value.store_bytes(lanes);
  for (int64_t i = 0; i < n; ++i) p[i] = lanes[i];
}

}  // namespace rarefy::cpu::RAREFY_ISA
