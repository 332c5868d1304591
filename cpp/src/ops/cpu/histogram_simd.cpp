#include "ops/cpu/histogram_simd.h"

#include "ops/cpu/simd.h"

namespace rarefy::cpu::RAREFY_ISA {
namespace {

constexpr int kBlock = 256;

/// First counters, (place - base) * kCounters + lane % kCounters. Adding 0 makes -0 positive.
inline void store_counters(Vec x, Vec inverse_width, int32_t base, int32_t* out) {
  const Vec value = x + Vec(0.0f);
#if defined(RAREFY_ISA_avx512)
  const __m512i steps = _mm512_cvttps_epi32(_mm512_mul_ps(_mm512_abs_ps(value.v), inverse_width.v));
  const __m512i sign = _mm512_srai_epi32(_mm512_castps_si512(value.v), 31);
  const __m512i bin = _mm512_sub_epi32(_mm512_xor_si512(steps, sign), _mm512_set1_epi32(base));
  const __m512i lane = _mm512_setr_epi32(0, 1, 2, 3, 0, 1, 2, 3, 0, 1, 2, 3, 0, 1, 2, 3);
  _mm512_storeu_si512(out, _mm512_or_si512(_mm512_slli_epi32(bin, 2), lane));
#elif defined(RAREFY_ISA_avx2)
  const __m256 magnitude = _mm256_andnot_ps(_mm256_set1_ps(-0.0f), value.v);
  const __m256i steps = _mm256_cvttps_epi32(_mm256_mul_ps(magnitude, inverse_width.v));
  const __m256i sign = _mm256_srai_epi32(_mm256_castps_si256(value.v), 31);
  const __m256i bin = _mm256_sub_epi32(_mm256_xor_si256(steps, sign), _mm256_set1_epi32(base));
  const __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 0, 1, 2, 3);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), _mm256_or_si256(_mm256_slli_epi32(bin, 2), lane));
#else
  for (int i = 0; i < Vec::size; ++i) {
    const float v = value.v[i];
    const auto steps = static_cast<int32_t>((v < 0.0f ? -v : v) * inverse_width.v[i]);
    out[i] = ((v < 0.0f ? ~steps : steps) - base) * kCounters + i % kCounters;
  }
#endif
}

/// Two counters by one load: loads and stores are what counting waits for.
inline void count_pair(const int32_t* places, uint32_t* counters) {
  uint64_t both;
  memcpy(&both, places, sizeof both);
  ++counters[both & 0xffffffffu];
  ++counters[both >> 32];
}

template <typename T>
void count_range(const T* x, float inverse, int32_t base, uint32_t* counters, int64_t n) {
  static_assert(kCounters == 4 && Vec::size % kCounters == 0 && kBlock % Vec::size == 0);
  const Vec inverse_width(inverse);
  int32_t places[kBlock];
  int64_t i = 0;
  for (; i + kBlock <= n; i += kBlock) {
    for (int k = 0; k < kBlock; k += Vec::size) {
      store_counters(Vec::load(x + i + k), inverse_width, base, places + k);
    }
    for (int k = 0; k < kBlock; k += 8) {
      count_pair(places + k, counters);
      count_pair(places + k + 2, counters);
      count_pair(places + k + 4, counters);
      count_pair(places + k + 6, counters);
    }
  }
  for (; i < n; i += Vec::size) {
    const int left = n - i < Vec::size ? static_cast<int>(n - i) : Vec::size;
    store_counters(left == Vec::size ? Vec::load(x + i) : Vec::load_first(x + i, left, 0.0f), inverse_width, base,
                   places);
    for (int k = 0; k < left; ++k) {
      ++counters[places[k]];
    }
  }
}

/// Weighted: what is clipped counts more. Adding 0 for it would not change a bit.
template <bool Weighted>
double integral(const double* edge, const double* weight, int64_t n, double scale, double first, double last,
                double clip_weight) {
  // Within cell k of the grid the error is x - k * scale: a whole cell holds scale^3 / 12, and the last, open one goes on as
  // a cubic. Eight sums, whatever the width of a vector.
  constexpr int kLanes = kSumsOfIntegral;
  double sums[kLanes] = {};
  const double third = 1.0 / 3.0, twelfth = 1.0 / 12.0, extra = (clip_weight - 1.0) * third;
  const double inverse = 1.0 / scale;  // the integral has no steps: which cell an edge falls to makes no difference
  const auto term = [&](double x, double w) {
    const double t = x * inverse;
    double k = __builtin_rint(t);
    k = k < first ? first : k;
    k = k > last ? last : k;
    const double r = t - k;
    const double cube = r * r * r;
    double value = k * twelfth + cube * third;
    if (Weighted) {
      const double above = cube - 0.125, below = cube + 0.125;
      value += ((above > 0.0 ? above : 0.0) + (below < 0.0 ? below : 0.0)) * extra;
    }
    return w * value;
  };
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    for (int l = 0; l < kLanes; ++l) {
      sums[l] += term(edge[i + l], weight[i + l]);
    }
  }
  for (int l = 0; i < n; ++i, ++l) {
    sums[l] += term(edge[i], weight[i]);
  }
  return ((sums[0] + sums[1]) + (sums[2] + sums[3])) + ((sums[4] + sums[5]) + (sums[6] + sums[7]));
}

}  // namespace

void count(const void* x, FloatType type, float inverse_width, int32_t base, uint32_t* counters, int64_t n) {
  RAREFY_FOR_FLOAT_TYPE(type, T, count_range(static_cast<const T*>(x), inverse_width, base, counters, n))
}

double squared_error_integral(const double* edge, const double* weight, int64_t n, double scale, double first,
                              double last, double clip_weight) {
  return clip_weight == 1.0 ? integral<false>(edge, weight, n, scale, first, last, clip_weight)
                            : integral<true>(edge, weight, n, scale, first, last, clip_weight);
}

}  // namespace rarefy::cpu::RAREFY_ISA
