#include "ops/cpu/sparse_linear_simd.h"

#include "ops/cpu/simd.h"

namespace rarefy::cpu::RAREFY_ISA {
namespace {

constexpr int kPerStep = kTileStep / Vec::size;  // vectors of 16 floats

// As many steps of samples at once as the registers hold with four sums of each.
#if defined(RAREFY_ISA_avx512)
constexpr int kMostSteps = 4;
#else
constexpr int kMostSteps = 1;
#endif

template <typename Column>
bool valid(const Column* columns, int64_t n, int64_t limit) {
  uint32_t beyond = 0;
  for (int64_t i = 0; i < n; ++i) {
    // A negative column is a large one here.
    beyond |=
        static_cast<uint32_t>(static_cast<int64_t>(static_cast<uint32_t>(static_cast<int32_t>(columns[i]))) >= limit);
  }
  return beyond == 0;
}

/// Sixteen floats.
struct Step {
  Vec v[kPerStep];

  static Step zero() {
    Step out;
    for (Vec& part : out.v) part = Vec(0.0f);
    return out;
  }
  template <typename T>
  static Step load(const T* p) {
    Step out;
    for (int i = 0; i < kPerStep; ++i) out.v[i] = Vec::load(p + i * Vec::size);
    return out;
  }
  static Step all(float value) {
    Step out;
    for (Vec& part : out.v) part = Vec(value);
    return out;
  }
  void store(float* p) const {
    for (int i = 0; i < kPerStep; ++i) v[i].store(p + i * Vec::size);
  }
  /// this + a * b
  void add_product(const Step& a, const Step& b) {
    for (int i = 0; i < kPerStep; ++i) v[i] = v[i] + a.v[i] * b.v[i];
  }
};

#if defined(RAREFY_ISA_avx512)
inline Vec gather(const float* x, const int32_t* columns) {
  return _mm512_i32gather_ps(_mm512_loadu_si512(columns), x, 4);
}
inline Vec gather(const float* x, const int16_t* columns) {
  const __m256i narrow = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(columns));
  return _mm512_i32gather_ps(_mm512_cvtepi16_epi32(narrow), x, 4);
}
#elif defined(RAREFY_ISA_avx2)
inline Vec gather(const float* x, const int32_t* columns) {
  return _mm256_i32gather_ps(x, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(columns)), 4);
}
inline Vec gather(const float* x, const int16_t* columns) {
  const __m128i narrow = _mm_loadu_si128(reinterpret_cast<const __m128i*>(columns));
  return _mm256_i32gather_ps(x, _mm256_cvtepi16_epi32(narrow), 4);
}
#else
template <typename Column>
inline Vec gather(const float* x, const Column* columns) {
  Vec out;
  for (int i = 0; i < Vec::size; ++i) out.v[i] = x[columns[i]];
  return out;
}
#endif

/// The sum of n floats: halves onto each other while n is even, then from front to back. Overwrites them.
inline float sum_of(float* lanes, int64_t n) {
  while (n % 2 == 0) {
    n /= 2;
    for (int64_t i = 0; i < n; ++i) lanes[i] = lanes[i] + lanes[i + n];
  }
  float sum = lanes[0];
  for (int64_t i = 1; i < n; ++i) sum = sum + lanes[i];
  return sum;
}

/// One sample, single weights: lane i % 16 adds product i.
template <typename T, typename Column>
bool vector_of_elements(const SparseMatrix& m, const float* x, float* y, int64_t begin, int64_t end) {
  for (int64_t r = begin; r < end; ++r) {
    const T* values = static_cast<const T*>(m.values) + m.offsets[r];
    const Column* columns = static_cast<const Column*>(m.columns) + m.offsets[r];
    const int64_t n = m.offsets[r + 1] - m.offsets[r];
    if (!valid(columns, n, m.column_count)) return false;
    Step sum = Step::zero();
    int64_t i = 0;
    for (; i + kTileStep <= n; i += kTileStep) {
      for (int part = 0; part < kPerStep; ++part) {
        const int64_t at = i + part * Vec::size;
        sum.v[part] = sum.v[part] + Vec::load(values + at) * gather(x, columns + at);
      }
    }
    float lanes[kTileStep];
    sum.store(static_cast<float*>(lanes));
    for (int lane = 0; i < n; ++i, ++lane) lanes[lane] = lanes[lane] + to_float(values[i]) * x[columns[i]];
    y[r] = sum_of(static_cast<float*>(lanes), kTileStep);
  }
  return true;
}

/// One sample, blocks of `steps` times 16 weights: each place of the block has a sum of its own.
template <typename T, typename Column, int steps>
bool vector_of_blocks(const SparseMatrix& m, const float* x, const float* scratch, float* y, int64_t begin,
                      int64_t end) {
  const int64_t size = m.height * m.width;
  for (int64_t r = begin; r < end; ++r) {
    const T* values = static_cast<const T*>(m.values) + m.offsets[r] * size;
    const Column* columns = static_cast<const Column*>(m.columns) + m.offsets[r];
    const int64_t n = m.offsets[r + 1] - m.offsets[r];
    if (!valid(columns, n, m.column_count)) return false;
    Step sums[steps];
    for (Step& sum : sums) sum = Step::zero();
    for (int64_t i = 0; i < n; ++i, values += size) {
      const int64_t column = columns[i];
      for (int s = 0; s < steps; ++s) {
        const Step from = m.width == 1   ? Step::all(x[column])
                          : m.width < 16 ? Step::load(scratch + column * kTileStep)
                                         : Step::load(x + column * m.width + s * kTileStep % m.width);
        sums[s].add_product(Step::load(values + s * kTileStep), from);
      }
    }
    float lanes[steps * kTileStep];
    for (int s = 0; s < steps; ++s) sums[s].store(static_cast<float*>(lanes) + s * kTileStep);
    for (int64_t h = 0; h < m.height; ++h) {
      y[r * m.height + h] = sum_of(static_cast<float*>(lanes) + h * m.width, m.width);
    }
  }
  return true;
}

template <typename T, typename Column>
bool vector_of(const SparseMatrix& m, const float* x, const float* scratch, float* y, int64_t begin, int64_t end) {
  switch (m.height * m.width) {
    case 1:
      return vector_of_elements<T, Column>(m, x, y, begin, end);
    case 16:
      return vector_of_blocks<T, Column, 1>(m, x, scratch, y, begin, end);
    case 32:
      return vector_of_blocks<T, Column, 2>(m, x, scratch, y, begin, end);
    case 48:
      return vector_of_blocks<T, Column, 3>(m, x, scratch, y, begin, end);
    default:
      return vector_of_blocks<T, Column, 4>(m, x, scratch, y, begin, end);
  }
}

/// Sums of one row for `steps` times 16 samples.
template <int steps>
struct Sums {
  Step s[steps];

  void clear() {
    for (Step& step : s) step = Step::zero();
  }
  void add(float weight, const float* samples) {
    const Step w = Step::all(weight);
    for (int i = 0; i < steps; ++i) s[i].add_product(w, Step::load(samples + i * kTileStep));
  }
  void plus(const Sums& other) {
    for (int i = 0; i < steps; ++i) {
      for (int k = 0; k < kPerStep; ++k) s[i].v[k] = s[i].v[k] + other.s[i].v[k];
    }
  }
  void store(float* out) const {
    for (int i = 0; i < steps; ++i) s[i].store(out + i * kTileStep);
  }
};

/// Stores the total of four sums.
template <int steps>
inline void store_total(Sums<steps>* sums, float* out) {
  sums[0].plus(sums[1]);
  sums[2].plus(sums[3]);
  sums[0].plus(sums[2]);
  sums[0].store(out);
}

/// One row of single weights: sum i % 4 adds product i.
template <int steps, typename T, typename Column>
inline void row_of_elements(const T* values, const Column* columns, int64_t n, const float* tile, int lanes,
                            float* out) {
  Sums<steps> sums[4];
  for (auto& sum : sums) sum.clear();
  int64_t i = 0;
  for (; i + 4 <= n; i += 4) {
    for (int q = 0; q < 4; ++q) sums[q].add(to_float(values[i + q]), tile + int64_t{columns[i + q]} * lanes);
  }
  for (int q = 0; i < n; ++i, ++q) sums[q].add(to_float(values[i]), tile + int64_t{columns[i]} * lanes);
  store_total<steps>(static_cast<Sums<steps>*>(sums), out);
}

/// One row out of a row of blocks: sum k % 4 adds the products of column k of every block.
template <int steps, typename T, typename Column>
inline void row_of_blocks(const SparseMatrix& m, const T* values, const Column* columns, int64_t n, const float* tile,
                          int lanes, float* out) {
  const int64_t size = m.height * m.width;
  Sums<steps> sums[4];
  for (auto& sum : sums) sum.clear();
  for (int64_t i = 0; i < n; ++i, values += size) {
    const float* from = tile + columns[i] * m.width * lanes;
    int64_t k = 0;
    for (; k + 4 <= m.width; k += 4) {
      for (int q = 0; q < 4; ++q) sums[q].add(to_float(values[k + q]), from + (k + q) * lanes);
    }
    for (int q = 0; k < m.width; ++k, ++q) sums[q].add(to_float(values[k]), from + k * lanes);
  }
  store_total<steps>(static_cast<Sums<steps>*>(sums), out);
}

/// Four rows out of a row of blocks, with one sum each: every vector of samples is loaded once for them.
template <int steps, typename T, typename Column>
inline void four_rows_of_blocks(const SparseMatrix& m, const T* values, const Column* columns, int64_t n,
                                const float* tile, int lanes, float* out) {
  const int64_t size = m.height * m.width;
  Sums<steps> sums[4];
  for (auto& sum : sums) sum.clear();
  for (int64_t i = 0; i < n; ++i, values += size) {
    const float* from = tile + columns[i] * m.width * lanes;
    for (int64_t k = 0; k < m.width; ++k, from += lanes) {
      Step samples[steps];
      for (int s = 0; s < steps; ++s) samples[s] = Step::load(from + s * kTileStep);
      for (int h = 0; h < 4; ++h) {
        const Step w = Step::all(to_float(values[h * m.width + k]));
        for (int s = 0; s < steps; ++s) sums[h].s[s].add_product(w, samples[s]);
      }
    }
  }
  for (int h = 0; h < 4; ++h) sums[h].store(out + h * lanes);
}

template <int steps, typename T, typename Column>
void tile_rows(const SparseMatrix& m, int64_t r, const float* tile, int lanes, float* out) {
  const int64_t size = m.height * m.width, n = m.offsets[r + 1] - m.offsets[r];
  const T* values = static_cast<const T*>(m.values) + m.offsets[r] * size;
  const Column* columns = static_cast<const Column*>(m.columns) + m.offsets[r];
  if (size == 1) {
    row_of_elements<steps>(values, columns, n, tile, lanes, out);
    return;
  }
  int64_t h = 0;
  for (; h + 4 <= m.height; h += 4) {
    four_rows_of_blocks<steps>(m, values + h * m.width, columns, n, tile, lanes, out + h * lanes);
  }
  for (; h < m.height; ++h) row_of_blocks<steps>(m, values + h * m.width, columns, n, tile, lanes, out + h * lanes);
}

template <typename T, typename Column>
bool tile_of(const SparseMatrix& m, const float* tile, int lanes, float* out, int64_t begin, int64_t end) {
  for (int64_t r = begin; r < end; ++r, out += m.height * lanes) {
    const int64_t n = m.offsets[r + 1] - m.offsets[r];
    if (!valid(static_cast<const Column*>(m.columns) + m.offsets[r], n, m.column_count)) return false;
    for (int lane = 0; lane < lanes;) {
      const int steps = (lanes - lane) / kTileStep;
      if (kMostSteps >= 4 && steps >= 4) {
        tile_rows<4, T, Column>(m, r, tile + lane, lanes, out + lane);
        lane += 4 * kTileStep;
      } else if (kMostSteps >= 4 && steps == 3) {
        tile_rows<3, T, Column>(m, r, tile + lane, lanes, out + lane);
        lane += 3 * kTileStep;
      } else if (kMostSteps >= 4 && steps == 2) {
        tile_rows<2, T, Column>(m, r, tile + lane, lanes, out + lane);
        lane += 2 * kTileStep;
      } else {
        tile_rows<1, T, Column>(m, r, tile + lane, lanes, out + lane);
        lane += kTileStep;
      }
    }
  }
  return true;
}

template <typename T>
void pack(const T* x, int64_t samples, int64_t features, float* tile, int lanes, int64_t begin, int64_t end) {
  constexpr int64_t kSquare = 16;
  for (int64_t k0 = begin; k0 < end; k0 += kSquare) {
    const int64_t k1 = k0 + kSquare < end ? k0 + kSquare : end;
    for (int64_t s = 0; s < samples; ++s) {
      for (int64_t k = k0; k < k1; ++k) tile[k * lanes + s] = to_float(x[s * features + k]);
    }
    for (int64_t k = k0; k < k1; ++k) {
      for (int64_t s = samples; s < lanes; ++s) tile[k * lanes + s] = 0.0f;
    }
  }
}

template <typename T>
void unpack(const float* rows, int lanes, int64_t count, int64_t samples, const float* bias, T* y, int64_t features,
            int64_t first) {
  for (int64_t s = 0; s < samples; ++s) {
    T* out = y + s * features + first;
    for (int64_t r = 0; r < count; ++r) {
      const float sum = rows[r * lanes + s];
      from_float(bias == nullptr ? sum : sum + bias[first + r], out + r);
    }
  }
}

}  // namespace

void sparse_expand(const SparseMatrix& m, const float* x, float* scratch) {
  for (int64_t c = 0; c < m.column_count; ++c) {
    for (int64_t lane = 0; lane < kTileStep; ++lane) scratch[c * kTileStep + lane] = x[c * m.width + lane % m.width];
  }
}

bool sparse_vector(const SparseMatrix& m, const float* x, const float* scratch, float* y, int64_t begin, int64_t end) {
  if (m.type == FloatType::f32) {
    return m.wide_columns ? vector_of<float, int32_t>(m, x, scratch, y, begin, end)
                          : vector_of<float, int16_t>(m, x, scratch, y, begin, end);
  }
  return m.wide_columns ? vector_of<Bf16, int32_t>(m, x, scratch, y, begin, end)
                        : vector_of<Bf16, int16_t>(m, x, scratch, y, begin, end);
}

void sparse_pack(FloatType type, const void* x, int64_t samples, int64_t features, float* tile, int lanes,
                 int64_t begin, int64_t end) {
  if (type == FloatType::f32) {
    pack(static_cast<const float*>(x), samples, features, tile, lanes, begin, end);
  } else {
    pack(static_cast<const Bf16*>(x), samples, features, tile, lanes, begin, end);
  }
}

bool sparse_tile(const SparseMatrix& m, const float* tile, int lanes, float* out, int64_t begin, int64_t end) {
  if (m.type == FloatType::f32) {
    return m.wide_columns ? tile_of<float, int32_t>(m, tile, lanes, out, begin, end)
                          : tile_of<float, int16_t>(m, tile, lanes, out, begin, end);
  }
  return m.wide_columns ? tile_of<Bf16, int32_t>(m, tile, lanes, out, begin, end)
                        : tile_of<Bf16, int16_t>(m, tile, lanes, out, begin, end);
}

void sparse_unpack(FloatType type, const float* rows, int lanes, int64_t count, int64_t samples, const float* bias,
                   void* y, int64_t features, int64_t first) {
  if (type == FloatType::f32) {
    unpack(rows, lanes, count, samples, bias, static_cast<float*>(y), features, first);
  } else {
    unpack(rows, lanes, count, samples, bias, static_cast<Bf16*>(y), features, first);
  }
}

}  // namespace rarefy::cpu::RAREFY_ISA
