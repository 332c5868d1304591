#include "ops/cpu/packed_simd.h"

#include "ops/cpu/simd.h"

namespace rarefy::cpu::RAREFY_ISA {
namespace {

/// A table in registers where it has 16 entries; in memory otherwise.
#if defined(RAREFY_ISA_avx512)
struct SmallTable {
  __m512 values;
  explicit SmallTable(const float* table) : values(_mm512_loadu_ps(table)) {}
  Vec at(const uint8_t* codes) const {
    const __m512i index = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(codes)));
    return Vec(_mm512_permutexvar_ps(index, values));
  }
};
struct LargeTable {
  const float* values;
  explicit LargeTable(const float* table) : values(table) {}
  Vec at(const uint8_t* codes) const {
    const __m512i index = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(codes)));
    return Vec(_mm512_i32gather_ps(index, values, 4));
  }
};
#elif defined(RAREFY_ISA_avx2)
struct SmallTable {
  __m256 low, high;
  explicit SmallTable(const float* table) : low(_mm256_loadu_ps(table)), high(_mm256_loadu_ps(table + 8)) {}
  Vec at(const uint8_t* codes) const {
    const __m256i index = _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(codes)));
    const __m256 upper = _mm256_castsi256_ps(_mm256_slli_epi32(index, 28));  // bit 3 chooses the half
    return Vec(_mm256_blendv_ps(_mm256_permutevar8x32_ps(low, index), _mm256_permutevar8x32_ps(high, index), upper));
  }
};
struct LargeTable {
  const float* values;
  explicit LargeTable(const float* table) : values(table) {}
  Vec at(const uint8_t* codes) const {
    const __m256i index = _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(codes)));
    return Vec(_mm256_i32gather_ps(values, index, 4));
  }
};
#else
struct LargeTable {
  const float* values;
  explicit LargeTable(const float* table) : values(table) {}
  Vec at(const uint8_t* codes) const {
    float lanes[Vec::size];
    for (int i = 0; i < Vec::size; ++i) lanes[i] = values[codes[i]];
    return Vec::load(static_cast<const float*>(lanes));
  }
};
using SmallTable = LargeTable;
#endif

template <typename Table>
void scale_table(const uint8_t* codes, int64_t n, const float* table, float scale, float* out) {
  const Table values(table);
  const Vec factor(scale);
  int64_t i = 0;
  for (; i + Vec::size <= n; i += Vec::size) {
    (values.at(codes + i) * factor).store(out + i);
  }
  for (; i < n; ++i) {
    out[i] = table[codes[i]] * scale;
  }
}

}  // namespace

void split_nibbles(const uint8_t* bytes, int64_t n, uint8_t* codes) {
  const int64_t pairs = n / 2;
  int64_t i = 0;
#if defined(RAREFY_ISA_avx512) || defined(RAREFY_ISA_avx2)
  const __m128i low_bits = _mm_set1_epi8(15);
  for (; i + 16 <= pairs; i += 16) {
    const __m128i both = _mm_loadu_si128(reinterpret_cast<const __m128i*>(bytes + i));
    const __m128i low = _mm_and_si128(both, low_bits), high = _mm_and_si128(_mm_srli_epi16(both, 4), low_bits);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(codes + 2 * i), _mm_unpacklo_epi8(low, high));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(codes + 2 * i + 16), _mm_unpackhi_epi8(low, high));
  }
#endif
  for (; i < pairs; ++i) {
    codes[2 * i] = bytes[i] & 15u;
    codes[2 * i + 1] = static_cast<uint8_t>(bytes[i] >> 4);
  }
  if (n % 2 != 0) {
    codes[n - 1] = bytes[pairs] & 15u;
  }
}

void scaled_table(const uint8_t* codes, int64_t n, const float* table, bool is_small, float scale, float* out) {
  if (is_small) {
    scale_table<SmallTable>(codes, n, table, scale, out);
  } else {
    scale_table<LargeTable>(codes, n, table, scale, out);
  }
}

void scaled_integers(const uint8_t* codes, int64_t n, float zero, float scale, float* out) {
  const Vec offset(zero), factor(scale);
  int64_t i = 0;
  for (; i + Vec::size <= n; i += Vec::size) {
    ((Vec::load_bytes(codes + i) - offset) * factor).store(out + i);
  }
  for (; i < n; ++i) {
    out[i] = (static_cast<float>(codes[i]) - zero) * scale;
  }
}

}  // namespace rarefy::cpu::RAREFY_ISA
