// Casts to a minifloat in vectors. Only for files that cmake/RarefyIsa.cmake compiles.
#pragma once

#include "ops/cpu/formats_simd.h"
#include "ops/cpu/simd.h"

namespace rarefy::cpu::RAREFY_ISA {

// --- Bits of floats, and choosing between lanes -------------------------------------------------------------------------

constexpr uint32_t kSign = 0x80000000u, kMagnitude = 0x7fffffffu, kExponent = 0x7f800000u;

#if defined(RAREFY_ISA_avx512)
inline Vec and_bits(Vec a, uint32_t mask) {
  return _mm512_and_ps(a.v, _mm512_castsi512_ps(_mm512_set1_epi32(static_cast<int>(mask))));
}
inline Vec or_bits(Vec a, Vec b) { return _mm512_or_ps(a.v, b.v); }
/// other where a > limit, a elsewhere (NaN too).
inline Vec replace_above(Vec a, Vec limit, Vec other) {
  return _mm512_mask_mov_ps(a.v, _mm512_cmp_ps_mask(a.v, limit.v, _CMP_GT_OQ), other.v);
}
/// chosen where a > limit, otherwise (also where a is NaN) rest.
inline Vec choose_above(Vec a, Vec limit, Vec chosen, Vec rest) {
  return _mm512_mask_mov_ps(rest.v, _mm512_cmp_ps_mask(a.v, limit.v, _CMP_GT_OQ), chosen.v);
}
/// value where low <= a <= high, +0 elsewhere.
inline Vec keep_within(Vec a, Vec low, Vec high, Vec value) {
  return _mm512_maskz_mov_ps(
      _mm512_mask_cmp_ps_mask(_mm512_cmp_ps_mask(a.v, low.v, _CMP_GE_OQ), a.v, high.v, _CMP_LE_OQ), value.v);
}
#elif defined(RAREFY_ISA_avx2)
inline Vec and_bits(Vec a, uint32_t mask) {
  return _mm256_and_ps(a.v, _mm256_castsi256_ps(_mm256_set1_epi32(static_cast<int>(mask))));
}
inline Vec or_bits(Vec a, Vec b) { return _mm256_or_ps(a.v, b.v); }
inline Vec replace_above(Vec a, Vec limit, Vec other) {
  return _mm256_blendv_ps(a.v, other.v, _mm256_cmp_ps(a.v, limit.v, _CMP_GT_OQ));
}
inline Vec choose_above(Vec a, Vec limit, Vec chosen, Vec rest) {
  return _mm256_blendv_ps(rest.v, chosen.v, _mm256_cmp_ps(a.v, limit.v, _CMP_GT_OQ));
}
inline Vec keep_within(Vec a, Vec low, Vec high, Vec value) {
  const __m256 inside = _mm256_and_ps(_mm256_cmp_ps(a.v, low.v, _CMP_GE_OQ), _mm256_cmp_ps(a.v, high.v, _CMP_LE_OQ));
  return _mm256_and_ps(value.v, inside);
}
#else
inline Vec and_bits(Vec a, uint32_t mask) {
  for (float& lane : a.v) lane = bits_to_float(float_to_bits(lane) & mask);
  return a;
}
inline Vec or_bits(Vec a, Vec b) {
  for (int i = 0; i < Vec::size; ++i) a.v[i] = bits_to_float(float_to_bits(a.v[i]) | float_to_bits(b.v[i]));
  return a;
}
inline Vec replace_above(Vec a, Vec limit, Vec other) {
  for (int i = 0; i < Vec::size; ++i) a.v[i] = a.v[i] > limit.v[i] ? other.v[i] : a.v[i];
  return a;
}
inline Vec choose_above(Vec a, Vec limit, Vec chosen, Vec rest) {
  for (int i = 0; i < Vec::size; ++i) rest.v[i] = a.v[i] > limit.v[i] ? chosen.v[i] : rest.v[i];
  return rest;
}
inline Vec keep_within(Vec a, Vec low, Vec high, Vec value) {
  for (int i = 0; i < Vec::size; ++i) value.v[i] = a.v[i] >= low.v[i] && a.v[i] <= high.v[i] ? value.v[i] : 0.0f;
  return value;
}
#endif

// --- Casts ----------------------------------------------------------------------------------------------------------------

/// A scale with its exact inverse where it has one: a power of two divides as its inverse multiplies.
struct Divisor {
  Vec scale, inverse;
  bool multiplies;

  void set(float value) {
    scale = Vec(value);
    const uint32_t bits = float_to_bits(value);
    // Exponents 2 to 252: the inverse is a normal number.
    multiplies = (bits & 0x7fffffu) == 0 && bits >= 0x01000000u && bits <= 0x7e000000u;
    inverse = Vec(multiplies ? 1.0f / value : 1.0f);
  }
  void load(const float* values, int count) {
    scale = count == Vec::size ? Vec::load(values) : Vec::load_first(values, count, 1.0f);
    multiplies = false;
  }
};

template <bool Multiplies>
inline Vec divide(Vec x, const Divisor& d) {
  return Multiplies ? x * d.inverse : x / d.scale;
}

struct ToMinifloat {
  Vec unit, smallest, cap, greatest, overflow, zero;

  explicit ToMinifloat(Element e)
      : unit(e.unit), smallest(e.smallest), cap(e.cap), greatest(e.greatest), overflow(e.overflow), zero(e.zero) {}
  Vec operator()(Vec y) const {
    const Vec magnitude = min(cap, and_bits(y, kMagnitude));  // a NaN stays
    // The adder rounds at the last bit of `magic`, which is the last bit of the mantissa.
    const Vec magic = max(smallest, and_bits(magnitude, kExponent)) * unit;
    const Vec rounded = (magnitude + magic) - magic;
    return or_bits(replace_above(rounded, greatest, overflow), and_bits(y, kSign)) + zero;
  }
};

}  // namespace rarefy::cpu::RAREFY_ISA
