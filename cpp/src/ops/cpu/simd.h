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
  if (magnitude >= 0x7c00u) {  // infinity or NaN, which becomes quiet
    return bits_to_float(sign | 0x7f800000u | (magnitude > 0x7c00u ? 0x400000u : 0u) | (magnitude & 0x3ffu) << 13);
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
    out->bits = static_cast<uint16_t>(sign | 0x7e00u | (magnitude >> 13 & 0x3ffu));  // quiet, upper payload kept
  } else if (magnitude >= 0x477ff000u) {                                             // rounds to 65536 or more
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
alignas(32) constexpr int32_t kExp2Eighths[8] = {0,        -0x46a3e, -0x7c810, -0xa0129,
                                                 -0xafb0d, -0xa98d6, -0x8bb03, -0x53f39};

// The bits of sqrt(1/2), where split_exponent starts its range.
constexpr int32_t kSqrtHalfBits = 0x3f3504f3;

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
  /// The first n < size values at p; the other lanes are `fill`.
  static Vec load_first(const float* p, int n, float fill) {
    return _mm512_mask_loadu_ps(_mm512_set1_ps(fill), first(n), p);
  }
  static Vec load_first(const Bf16* p, int n, float fill) {
    const __m512i wide = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(first(n), p));
    return _mm512_mask_mov_ps(_mm512_set1_ps(fill), first(n), _mm512_castsi512_ps(_mm512_slli_epi32(wide, 16)));
  }
  static Vec load_first(const Half* p, int n, float fill) {
    return _mm512_mask_cvtph_ps(_mm512_set1_ps(fill), first(n), _mm256_maskz_loadu_epi16(first(n), p));
  }
  void store(float* p) const { _mm512_storeu_ps(p, v); }
  void store(Bf16* p) const { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), to_bf16()); }
  void store(Half* p) const { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), to_half()); }
  /// The first n < size lanes to p.
  void store_first(float* p, int n) const { _mm512_mask_storeu_ps(p, first(n), v); }
  void store_first(Bf16* p, int n) const { _mm256_mask_storeu_epi16(p, first(n), to_bf16()); }
  void store_first(Half* p, int n) const { _mm256_mask_storeu_epi16(p, first(n), to_half()); }
  /// Past the caches, to an address that is a multiple of kStreamAlignment.
  void stream(float* p) const { _mm512_stream_ps(p, v); }
  void stream(Bf16* p) const { _mm256_stream_si256(reinterpret_cast<__m256i*>(p), to_bf16()); }
  void stream(Half* p) const { _mm256_stream_si256(reinterpret_cast<__m256i*>(p), to_half()); }
  static __mmask16 first(int n) { return static_cast<__mmask16>((1u << n) - 1u); }
  __m256i to_bf16() const {
    const __m512i bits = _mm512_castps_si512(v);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    __m512i rounded = _mm512_srli_epi32(_mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff))), 16);
    const __mmask16 nan = _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
    rounded = _mm512_mask_mov_epi32(rounded, nan, _mm512_set1_epi32(0x7fc0));
    return _mm512_cvtepi32_epi16(rounded);
  }
  __m256i to_half() const { return _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT); }
  /// Whole numbers: bytes without a sign, bytes with one, and 32-bit differences a - b, rounded to float.
  static Vec load_bytes(const uint8_t* p) {
    return _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
  }
  static Vec load_bytes(const int8_t* p) {
    return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
  }
  static Vec load_difference(const int32_t* a, const int32_t* b) {
    return _mm512_cvtepi32_ps(_mm512_sub_epi32(_mm512_loadu_si512(a), _mm512_loadu_si512(b)));
  }
  /// Lowest byte of each value as an integer; the values are whole and within -128..255.
  void store_bytes(uint8_t* p) const {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtepi32_epi8(_mm512_cvtps_epi32(v)));
  }
  void store_bytes_first(uint8_t* p, int n) const {
    _mm_mask_storeu_epi8(p, first(n), _mm512_cvtepi32_epi8(_mm512_cvtps_epi32(v)));
  }

  friend Vec operator+(Vec a, Vec b) { return _mm512_add_ps(a.v, b.v); }
  friend Vec operator-(Vec a, Vec b) { return _mm512_sub_ps(a.v, b.v); }
  friend Vec operator*(Vec a, Vec b) { return _mm512_mul_ps(a.v, b.v); }
  friend Vec operator/(Vec a, Vec b) { return _mm512_div_ps(a.v, b.v); }
  /// min and max return b when either operand is NaN.
  friend Vec min(Vec a, Vec b) { return _mm512_min_ps(a.v, b.v); }
  friend Vec max(Vec a, Vec b) { return _mm512_max_ps(a.v, b.v); }
  friend Vec round_even(Vec a) { return _mm512_roundscale_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
  /// The least and the greatest lane, of values that are not NaN. Which of -0 and 0 is returned is not specified.
  friend float least(Vec a) { return _mm512_reduce_min_ps(a.v); }
  friend float greatest(Vec a) { return _mm512_reduce_max_ps(a.v); }
  /// Bit i is set when low <= a[i] <= high; false for NaN.
  friend uint32_t within(Vec a, Vec low, Vec high) {
    const __mmask16 above = _mm512_cmp_ps_mask(a.v, low.v, _CMP_GE_OQ);
    return _mm512_mask_cmp_ps_mask(above, a.v, high.v, _CMP_LE_OQ);
  }
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
  /// m in [sqrt(1/2), sqrt(2)) and the whole number *exponent with a = m * 2^exponent, for normal positive a.
  friend Vec split_exponent(Vec a, Vec* exponent) {
    const __m512i bits = _mm512_castps_si512(a.v);
    const __m512i e = _mm512_srai_epi32(_mm512_sub_epi32(bits, _mm512_set1_epi32(kSqrtHalfBits)), 23);
    *exponent = _mm512_cvtepi32_ps(e);
    return _mm512_castsi512_ps(_mm512_sub_epi32(bits, _mm512_slli_epi32(e, 23)));
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
  static Vec load_first(const float* p, int n, float fill) {
    const __m256i mask = first(n);
    return _mm256_blendv_ps(_mm256_set1_ps(fill), _mm256_maskload_ps(p, mask), _mm256_castsi256_ps(mask));
  }
  template <typename T>
  static Vec load_first(const T* p, int n, float fill) {
    float lanes[size];
    for (int i = 0; i < size; ++i) lanes[i] = i < n ? to_float(p[i]) : fill;
    return _mm256_loadu_ps(lanes);
  }
  void store(float* p) const { _mm256_storeu_ps(p, v); }
  void store(Bf16* p) const { _mm_storeu_si128(reinterpret_cast<__m128i*>(p), to_bf16()); }
  void store(Half* p) const { _mm_storeu_si128(reinterpret_cast<__m128i*>(p), to_half()); }
  void store_first(float* p, int n) const { _mm256_maskstore_ps(p, first(n), v); }
  template <typename T>
  void store_first(T* p, int n) const {
    T lanes[size];
    store(static_cast<T*>(lanes));
    for (int i = 0; i < n; ++i) p[i] = lanes[i];
  }
  void stream(float* p) const { _mm256_stream_ps(p, v); }
  void stream(Bf16* p) const { _mm_stream_si128(reinterpret_cast<__m128i*>(p), to_bf16()); }
  void stream(Half* p) const { _mm_stream_si128(reinterpret_cast<__m128i*>(p), to_half()); }
  static __m256i first(int n) {
    return _mm256_cmpgt_epi32(_mm256_set1_epi32(n), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
  }
  __m128i to_bf16() const {
    const __m256i bits = _mm256_castps_si256(v);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    __m256i rounded = _mm256_srli_epi32(_mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff))), 16);
    const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(v, v, _CMP_UNORD_Q));
    rounded = _mm256_blendv_epi8(rounded, _mm256_set1_epi32(0x7fc0), nan);
    return _mm256_castsi256_si128(_mm256_permute4x64_epi64(_mm256_packus_epi32(rounded, rounded), 0x08));
  }
  __m128i to_half() const { return _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT); }
  static Vec load_bytes(const uint8_t* p) {
    return _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))));
  }
  static Vec load_bytes(const int8_t* p) {
    return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))));
  }
  static Vec load_difference(const int32_t* a, const int32_t* b) {
    return _mm256_cvtepi32_ps(_mm256_sub_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(a)),
                                               _mm256_loadu_si256(reinterpret_cast<const __m256i*>(b))));
  }
  void store_bytes(uint8_t* p) const {
    const __m256i whole = _mm256_and_si256(_mm256_cvtps_epi32(v), _mm256_set1_epi32(0xff));
    const __m256i words = _mm256_permute4x64_epi64(_mm256_packus_epi32(whole, whole), 0x08);
    const __m128i bytes = _mm_packus_epi16(_mm256_castsi256_si128(words), _mm256_castsi256_si128(words));
    _mm_storel_epi64(reinterpret_cast<__m128i*>(p), bytes);
  }
  void store_bytes_first(uint8_t* p, int n) const {
    uint8_t lanes[size];
    store_bytes(static_cast<uint8_t*>(lanes));
    for (int i = 0; i < n; ++i) p[i] = lanes[i];
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
  friend Vec zero_below(Vec a, Vec low, Vec value) {
    return _mm256_and_ps(value.v, _mm256_cmp_ps(a.v, low.v, _CMP_NLT_UQ));
  }
  friend Vec exp2_eighths(Vec a) {
    const __m256i table = _mm256_load_si256(reinterpret_cast<const __m256i*>(kExp2Eighths));
    const __m256i bits = _mm256_castps_si256(a.v);
    return _mm256_castsi256_ps(_mm256_add_epi32(_mm256_slli_epi32(bits, 20), _mm256_permutevar8x32_epi32(table, bits)));
  }
  friend Vec split_exponent(Vec a, Vec* exponent) {
    const __m256i bits = _mm256_castps_si256(a.v);
    const __m256i e = _mm256_srai_epi32(_mm256_sub_epi32(bits, _mm256_set1_epi32(kSqrtHalfBits)), 23);
    *exponent = _mm256_cvtepi32_ps(e);
    return _mm256_castsi256_ps(_mm256_sub_epi32(bits, _mm256_slli_epi32(e, 23)));
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
  static Vec load_first(const T* p, int n, float fill) {
    Vec out(fill);
    for (int i = 0; i < n; ++i) out.v[i] = to_float(p[i]);
    return out;
  }
  template <typename T>
  void store(T* p) const {
    store_first(p, size);
  }
  template <typename T>
  void store_first(T* p, int n) const {
    for (int i = 0; i < n; ++i) from_float(v[i], p + i);
  }
  template <typename T>
  void stream(T* p) const {
    store(p);
  }
  template <typename Byte>
  static Vec load_bytes(const Byte* p) {
    Vec out;
    for (int i = 0; i < size; ++i) out.v[i] = static_cast<float>(p[i]);
    return out;
  }
  static Vec load_difference(const int32_t* a, const int32_t* b) {
    Vec out;
    for (int i = 0; i < size; ++i) out.v[i] = static_cast<float>(a[i] - b[i]);
    return out;
  }
  void store_bytes(uint8_t* p) const { store_bytes_first(p, size); }
  void store_bytes_first(uint8_t* p, int n) const {
    for (int i = 0; i < n; ++i) p[i] = static_cast<uint8_t>(static_cast<int32_t>(v[i]));
  }

#define RAREFY_LANES(expression)                        \
  Vec out;                                              \
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
  friend Vec zero_below(Vec a, Vec low, Vec value) { RAREFY_LANES(a.v[i] < low.v[i] ? 0.0f : value.v[i]) }
  friend Vec exp2_eighths(Vec a) {
    RAREFY_LANES(
        bits_to_float((float_to_bits(a.v[i]) << 20) + static_cast<uint32_t>(kExp2Eighths[float_to_bits(a.v[i]) & 7u])))
  }
#undef RAREFY_LANES
  friend Vec split_exponent(Vec a, Vec* exponent) {
    Vec out;
    for (int i = 0; i < size; ++i) {
      const uint32_t bits = float_to_bits(a.v[i]);
      const int32_t e = static_cast<int32_t>(bits - static_cast<uint32_t>(kSqrtHalfBits)) >> 23;
      exponent->v[i] = static_cast<float>(e);
      out.v[i] = bits_to_float(bits - (static_cast<uint32_t>(e) << 23));
    }
    return out;
  }
};

#endif

/// The first n < Vec::size whole numbers; the other lanes are 0.
template <typename Byte>
inline Vec load_bytes_first(const Byte* p, int n) {
  Byte lanes[Vec::size] = {};
  memcpy(lanes, p, static_cast<size_t>(n));
  return Vec::load_bytes(static_cast<const Byte*>(lanes));
}
inline Vec load_difference_first(const int32_t* a, const int32_t* b, int n) {
  int32_t left[Vec::size] = {}, right[Vec::size] = {};
  memcpy(left, a, static_cast<size_t>(n) * sizeof(int32_t));
  memcpy(right, b, static_cast<size_t>(n) * sizeof(int32_t));
  return Vec::load_difference(static_cast<const int32_t*>(left), static_cast<const int32_t*>(right));
}

#if !defined(RAREFY_ISA_avx512)
inline float least(Vec a) {
  float lanes[Vec::size];
  a.store(static_cast<float*>(lanes));
  for (int i = 1; i < Vec::size; ++i) lanes[0] = lanes[i] < lanes[0] ? lanes[i] : lanes[0];
  return lanes[0];
}
inline float greatest(Vec a) {
  float lanes[Vec::size];
  a.store(static_cast<float*>(lanes));
  for (int i = 1; i < Vec::size; ++i) lanes[0] = lanes[i] > lanes[0] ? lanes[i] : lanes[0];
  return lanes[0];
}
#endif

/// What Vec::stream needs of its address, for every element type.
constexpr uintptr_t kStreamAlignment = 64;

/// After streaming stores: makes them visible before whatever this thread publishes next.
inline void stream_fence() {
#if !defined(RAREFY_ISA_plain)
  _mm_sfence();
#endif
}

// --- Bits, not numbers: 64 elements under 64 bits of a mask -----------------------------------------------------------
/// out[i] = in[i] where bit i of mask is 1, else 0, for i in [0, n), n <= 64. `in` may be `out`.
template <typename Word>
inline void keep_words_tail(const Word* in, uint64_t mask, Word* out, int n) {
  for (int i = 0; i < n; ++i) out[i] = static_cast<Word>((mask >> i & 1u) != 0 ? in[i] : 0);
}
/// The same for n = 64. Streaming needs `out` at a multiple of kStreamAlignment.
template <bool Streaming>
inline void keep_words(const uint32_t* in, uint64_t mask, uint32_t* out) {
#if defined(RAREFY_ISA_avx512)
  for (int i = 0; i < 64; i += 16) {
    const __m512i kept = _mm512_maskz_loadu_epi32(static_cast<__mmask16>(mask >> i), in + i);
    if (Streaming) {
      _mm512_stream_si512(reinterpret_cast<__m512i*>(out + i), kept);
    } else {
      _mm512_storeu_si512(out + i, kept);
    }
  }
#elif defined(RAREFY_ISA_avx2)
  const __m256i lanes = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
  for (int i = 0; i < 64; i += 8) {
    const __m256i set = _mm256_and_si256(_mm256_set1_epi32(static_cast<int>(mask >> i & 0xffu)), lanes);
    const __m256i value = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(in + i));
    const __m256i kept = _mm256_and_si256(value, _mm256_cmpeq_epi32(set, lanes));
    if (Streaming) {
      _mm256_stream_si256(reinterpret_cast<__m256i*>(out + i), kept);
    } else {
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + i), kept);
    }
  }
#else
  keep_words_tail(in, mask, out, 64);
#endif
}
template <bool Streaming>
inline void keep_words(const uint16_t* in, uint64_t mask, uint16_t* out) {
#if defined(RAREFY_ISA_avx512)
  for (int i = 0; i < 64; i += 32) {
    const __m512i kept = _mm512_maskz_loadu_epi16(static_cast<__mmask32>(mask >> i), in + i);
    if (Streaming) {
      _mm512_stream_si512(reinterpret_cast<__m512i*>(out + i), kept);
    } else {
      _mm512_storeu_si512(out + i, kept);
    }
  }
#elif defined(RAREFY_ISA_avx2)
  const __m256i lanes = _mm256_setr_epi16(1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384, -32768);
  for (int i = 0; i < 64; i += 16) {
    const __m256i set = _mm256_and_si256(_mm256_set1_epi16(static_cast<int16_t>(mask >> i)), lanes);
    const __m256i value = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(in + i));
    const __m256i kept = _mm256_and_si256(value, _mm256_cmpeq_epi16(set, lanes));
    if (Streaming) {
      _mm256_stream_si256(reinterpret_cast<__m256i*>(out + i), kept);
    } else {
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + i), kept);
    }
  }
#else
  keep_words_tail(in, mask, out, 64);
#endif
}

}  // namespace rarefy::cpu::RAREFY_ISA
