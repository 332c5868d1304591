#include "ops/cpu/range_search_simd.h"

#include "ops/cpu/lane_sum.h"
#include "ops/cpu/minifloat_simd.h"
#include "ops/cpu/simd_math.h"

namespace rarefy::cpu::RAREFY_ISA {
namespace {

inline Vec absolute(Vec a) { return max(a, Vec(0.0f) - a); }

/// |r|^norm for |r| <= bound, by logarithm and exponential: within some 1e-6 of it.
struct Power {
  Vec norm_of_log2, inverse_bound, bound_to_norm;

  Power(double norm, float bound)
      : norm_of_log2(static_cast<float>(norm * 1.4426950408889634)),
        inverse_bound(1.0f / bound),
        bound_to_norm(static_cast<float>(__builtin_pow(bound, norm))) {}
  Vec operator()(Vec magnitude) const {
    const Vec part = min(magnitude * inverse_bound, Vec(1.0f));
    return exp2_nonpositive(min(log_positive(part) * norm_of_log2, Vec(0.0f))) * bound_to_norm;
  }
};

/// Calls body(part, i, count) for every vector of [0, n), and flush() after at most kChunk elements, until that says false.
template <typename Body, typename Flush>
inline void for_each_vector(int64_t n, Body body, Flush flush) {
  for (int64_t begin = 0; begin < n; begin += kChunk) {
    const int64_t end = begin + kChunk < n ? begin + kChunk : n;
    int64_t i = begin;
    for (; i + Vec::size <= end; i += Vec::size) {
      body(static_cast<int>((i - begin) / Vec::size) % kParts, i, Vec::size);
    }
    if (i < end) {
      body(static_cast<int>((i - begin) / Vec::size) % kParts, i, static_cast<int>(end - i));
    }
    if (!flush()) {
      return;
    }
  }
}

inline Vec load_some(const float* p, int count) {
  return count == Vec::size ? Vec::load(p) : Vec::load_first(p, count, 0.0f);
}

template <typename Measure>
double sum_of_errors(const float* x, const float* importance, int64_t n, StepGrid grid, double factor, double limit,
                     Measure measure) {
  // Multiplied, not divided: on a tie both neighbours are equally far, so the error does not notice.
  const Vec inverse(1.0f / grid.scale), first(grid.first), last(grid.last);
  LaneSum sum;
  double total = 0.0;
  for_each_vector(
      n,
      [&](int part, int64_t i, int count) {
        const Vec t = load_some(x + i, count) * inverse;
        const Vec k = min(max(round_even(t), first), last);
        Vec error = measure(t - k);
        if (importance != nullptr) {
          error = error * load_some(importance + i, count);
        }
        if (count < Vec::size) {  // lanes without a value, of which 0 need not be on the grid
          float lanes[Vec::size];
          error.store(static_cast<float*>(lanes));
          for (int l = count; l < Vec::size; ++l) lanes[l] = 0.0f;
          error = Vec::load(static_cast<const float*>(lanes));
        }
        sum.add(part, error);
      },
      [&] {
        sum.flush(&total);
        return !(total * factor > limit);  // no term is negative
      });
  return total * factor;
}

template <bool Multiplies>
double sum_of_cast_errors(const float* x, const float* weight, int64_t n, const Divisor& d, const ToMinifloat& cast,
                          double limit) {
  double sums[kStep] = {};
  const auto total = [&] {
    double halves[kStep];
    for (int l = 0; l < kStep; ++l) halves[l] = sums[l];
    for (int width = kStep / 2; width > 0; width /= 2) {
      for (int l = 0; l < width; ++l) halves[l] += halves[l + width];
    }
    return halves[0];
  };
  for (int64_t begin = 0; begin < n; begin += kChunk) {
    const int size = static_cast<int>(n - begin < kChunk ? n - begin : kChunk);
    const int steps = (size + kStep - 1) / kStep;
    float terms[kChunk];
    for (int i = 0; i < steps * kStep; i += Vec::size) {
      Vec term(0.0f);  // where there is no value
      if (i < size) {
        const int count = size - i < Vec::size ? size - i : Vec::size;
        const Vec value = load_some(x + begin + i, count);
        const Vec distance = value - cast(divide<Multiplies>(value, d)) * d.scale;
        term = distance * distance;
        if (weight != nullptr) {
          term = term * load_some(weight + begin + i, count);
        }
      }
      term.store(terms + i);
    }
    for (int step = 0; step < steps; ++step) {
      for (int l = 0; l < kStep; ++l) sums[l] += static_cast<double>(terms[step * kStep + l]);
    }
    if (begin + kChunk < n && total() > limit) {  // no term is negative
      break;
    }
  }
  return total();
}

}  // namespace

double cast_error(const float* x, const float* weight, int64_t n, float scale, Element element, double limit) {
  Divisor d;
  d.set(scale);
  const ToMinifloat cast(element);
  return d.multiplies ? sum_of_cast_errors<true>(x, weight, n, d, cast, limit)
                      : sum_of_cast_errors<false>(x, weight, n, d, cast, limit);
}

double grid_error(const float* x, const float* importance, int64_t n, StepGrid grid, double norm, float bound,
                  double factor, double limit) {
  if (norm == 2.0) {
    return sum_of_errors(x, importance, n, grid, factor, limit, [](Vec r) { return r * r; });
  }
  if (norm == 1.0) {
    return sum_of_errors(x, importance, n, grid, factor, limit, [](Vec r) { return absolute(r); });
  }
  const Power power(norm, bound);
  return sum_of_errors(x, importance, n, grid, factor, limit, [&](Vec r) {
    const Vec magnitude = absolute(r);
    return zero_below(magnitude, Vec(1.17549435e-38f), power(magnitude));
  });
}

void splitting_sums(const float* x, int64_t n, float scale, float z, float qmin, float qmax, float norm, float beta,
                    float bound, SplittingSums* sums) {
  const Vec inverse(1.0f / scale), zero_point(z), low(qmin), high(qmax), inverse_beta(1.0f / beta), zero(0.0f);
  const Vec tiny(1e-30f);
  const Power power(static_cast<double>(norm), bound);
  LaneSum q_sum, t_sum, qq_sum, tq_sum;
  *sums = {0.0, 0.0, 0.0, 0.0};
  for_each_vector(
      n,
      [&](int part, int64_t i, int count) {
        const Vec scaled = load_some(x + i, count) * inverse;
        const Vec q = min(max(round_even(scaled + zero_point), low), high);
        const Vec r = scaled - (q - zero_point);
        const Vec magnitude = absolute(r);
        const Vec floor = max(magnitude, tiny);
        const Vec shrunk = max(magnitude - power(magnitude) / floor * inverse_beta, zero);
        const Vec e = shrunk * (r / floor);
        Vec t = scaled - e, counted_q = q;
        if (count < Vec::size) {
          float lanes[2][Vec::size];
          t.store(static_cast<float*>(lanes[0]));
          q.store(static_cast<float*>(lanes[1]));
          for (int l = count; l < Vec::size; ++l) lanes[0][l] = lanes[1][l] = 0.0f;
          t = Vec::load(static_cast<const float*>(lanes[0]));
          counted_q = Vec::load(static_cast<const float*>(lanes[1]));
        }
        q_sum.add(part, counted_q);
        t_sum.add(part, t);
        qq_sum.add(part, counted_q * counted_q);
        tq_sum.add(part, t * counted_q);
      },
      [&] {
        q_sum.flush(&sums->q);
        t_sum.flush(&sums->t);
        qq_sum.flush(&sums->qq);
        tq_sum.flush(&sums->tq);
        return true;
      });
}

}  // namespace rarefy::cpu::RAREFY_ISA
