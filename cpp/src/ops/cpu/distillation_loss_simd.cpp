#include "ops/cpu/distillation_loss_simd.h"

#include "ops/cpu/distillation_mixture_simd.h"
#include "ops/cpu/lane_sum.h"
#include "ops/cpu/simd_math.h"

namespace rarefy::cpu::RAREFY_ISA {
namespace {

constexpr float kLowestNormal = 1.17549435e-38f;
constexpr float kInfinity = __builtin_inff();
constexpr float kLog2E = 1.44269504f;
// Exponents of 2 between which exponentials and their sums are normal floats.
constexpr float kLowestExponent = -125.0f;
constexpr float kHighestExponent = 60.0f;
constexpr uintptr_t kAhead = 1024;  // elements
constexpr int64_t kSample = 64;     // elements whose maximum stands for the row's

/// The greatest of n elements, but for NaN, which shows in the sums.
template <typename T>
float greatest_of(const T* x, int64_t n) {
  Vec high[4];  // hides the latency of max
  for (Vec& part : high) {
    part = Vec(-kInfinity);
  }
  int64_t i = 0;
  for (; i + 4 * Vec::size <= n; i += 4 * Vec::size) {
    for (int k = 0; k < 4; ++k) {
      high[k] = max(Vec::load(x + i + k * Vec::size), high[k]);
    }
  }
  for (; i < n; i += Vec::size) {
    const int count = n - i < Vec::size ? static_cast<int>(n - i) : Vec::size;
    high[0] = max(count < Vec::size ? Vec::load_first(x + i, count, -kInfinity) : Vec::load(x + i), high[0]);
  }
  return greatest(max(max(high[0], high[1]), max(high[2], high[3])));
}

inline Vec square(Vec x, int times) {
  for (; times > 0; --times) {
    x = x * x;
  }
  return x;
}

/// What is kept of the divergence between the sums and the gradient, beside e^(s/T).
enum class Soft {
  none,        // there is no such term
  kl,          // e^(t/T)
  reverse_kl,  // s - t
  mixture,     // e^(t/T), and then what distillation_mixture_simd.h makes of it
};

/// Where e^s for the cross-entropy comes from.
enum class Hard {
  none,      // no such term
  same,      // T is 1, or there is no divergence: the one exponential
  squares,   // T is a power of 2: the divergence's exponential, squared
  separate,  // its own exponential
};

/// One row. The exponentials are kept in row.scratch between the sums and the gradient.
template <typename T, Soft soft, Hard hard>
class RowDistiller {
 public:
  RowDistiller(const DistillationTask& task, const DistillationRow& row)
      : task_(task),
        student_(static_cast<const T*>(row.student)),
        teacher_(static_cast<const T*>(row.teacher)),
        grad_(static_cast<T*>(row.grad)),
        soft_s_(row.scratch),
        soft_t_(row.scratch + (task.classes + kStep - 1) / kStep * kStep),
        hard_s_(soft_t_ + (task.classes + kStep - 1) / kStep * kStep),
        label_(row.label),
        weight_(row.weight) {}

  DistillationSums run() {
    soft_factor_ = Vec(task_.soft_factor);
    hard_factor_ = Vec(kLog2E);
    const bool keep = soft == Soft::mixture || grad_ != nullptr;
    // Any number near the maximum does, so that one pass over the row is enough; a row with an exponential that is out of
    // range from there takes the maximum itself.
    set_references(task_.classes < kSample ? task_.classes : kSample);
    if (!(keep ? accumulate<true, true>() : accumulate<true, false>())) {
      set_references(task_.classes);
      keep ? accumulate<false, true>() : accumulate<false, false>();
    }
    if constexpr (hard == Hard::same && kSoft) {
      sums_.hard_student = sums_.soft_student;
    }
    if constexpr (hard != Hard::none) {
      sums_.label_logit = to_float(student_[label_]);
      sums_.student_sum = task_.label_smoothing > 0.0f ? sum_of_student() : 0.0;
    }
    if constexpr (soft == Soft::mixture) {
      const Mixture mixture =
          mix(task_.divergence, task_.skew, soft_s_, soft_t_, task_.classes, sums_.soft_student, sums_.soft_teacher);
      sums_.divergence = mixture.divergence;
      mean_slope_ = mixture.mean_slope;
    } else if constexpr (soft == Soft::reverse_kl) {
      mean_slope_ = sums_.divergence / sums_.soft_student;
    }
    if (grad_ != nullptr) {
      write_gradient();
    }
    return sums_;
  }

 private:
  static constexpr bool kSoft = soft != Soft::none;
  static constexpr bool kOwnHard = hard == Hard::separate || (hard == Hard::same && !kSoft);

  void set_references(int64_t sampled) {
    sums_ = DistillationSums{};
    sums_.reference = greatest_of(student_, sampled);
    reference_s_ = Vec(sums_.reference);
    reference_t_ = kSoft ? Vec(greatest_of(teacher_, sampled)) : reference_s_;
  }

  template <bool InRange>
  static Vec exponential(Vec x) {
    if constexpr (InRange) {
      return exp2_bounded(x);
    } else {
      return exp2_nonpositive(x);
    }
  }

  struct Sums {
    LaneSum student, teacher, divergence, hard_student;
    Vec high = Vec(-kInfinity), low = Vec(kInfinity);
  };

  /// Adds the vector of logits s, t at element i, the part-th vector of its step. The last vectors of a row may hold -inf in
  /// lanes past its end, so that the lowest exponent is not looked at there, and these are computed for any exponent.
  template <bool InRange, bool Keep, bool Last>
  void add(Sums& sums, int part, int64_t i, Vec s, Vec t) {
    const Vec us = s - reference_s_;
    const Vec ut = kSoft ? t - reference_t_ : us;
    sums.high = max(max(us, ut), sums.high);
    if constexpr (!Last) {
      sums.low = min(min(us, ut), sums.low);
    }
    Vec e_s;
    if constexpr (kSoft) {
      e_s = exponential<InRange>(us * soft_factor_);
      const Vec e_t = exponential<InRange>(ut * soft_factor_);
      sums.student.add(part, e_s);
      sums.teacher.add(part, e_t);
      Vec kept = e_t;
      // A class without mass adds nothing, even where t - s is not a number.
      if constexpr (soft == Soft::kl) {
        const Vec cross = e_t * (ut - us);
        sums.divergence.add(part, InRange ? cross : zero_below(e_t, Vec(kLowestNormal), cross));
      } else if constexpr (soft == Soft::reverse_kl) {
        kept = InRange ? us - ut : zero_below(e_s, Vec(kLowestNormal), us - ut);
        sums.divergence.add(part, e_s * kept);
      }
      if constexpr (Keep) {
        e_s.store(soft_s_ + i);
        kept.store(soft_t_ + i);
      }
    }
    if constexpr (hard == Hard::squares) {
      sums.hard_student.add(part, square(e_s, task_.squarings));
    } else if constexpr (kOwnHard) {
      const Vec e = exponential<InRange>(us * hard_factor_);
      sums.hard_student.add(part, e);
      if constexpr (Keep) {
        e.store(hard_s_ + i);
      }
    }
  }

  /// Asks for what comes a page later, in this row or the next: memory works meanwhile. A whole row ahead would push long
  /// rows out of the cache before they are used. Past the last row it does nothing.
  template <int Write>
  static void prefetch(const T* p) {
    __builtin_prefetch(reinterpret_cast<const void*>(reinterpret_cast<uintptr_t>(p) + kAhead * sizeof(T)), Write, 2);
  }

  /// The sums of the row, and with Keep its exponentials. With InRange it gives up, returning false, where an exponential is
  /// out of range.
  template <bool InRange, bool Keep>
  bool accumulate() {
    const int64_t n = task_.classes;
    const int64_t whole = n / kStep * kStep;
    const float factor = hard != Hard::none && task_.soft_factor < kLog2E ? kLog2E : task_.soft_factor;
    Sums sums;
    for (int64_t chunk = 0; chunk < n; chunk += kChunk) {
      const int64_t end = chunk + kChunk < whole ? chunk + kChunk : whole;
      for (int64_t step = chunk; step < end; step += kStep) {
        prefetch<0>(student_ + step);
        if constexpr (kSoft) {
          prefetch<0>(teacher_ + step);
        }
        if constexpr (Keep) {
          prefetch<1>(grad_ + step);
        }
        for (int part = 0; part < kParts; ++part) {
          const int64_t i = step + part * Vec::size;
          add<InRange, Keep, false>(sums, part, i, Vec::load(student_ + i),
                                    kSoft ? Vec::load(teacher_ + i) : Vec(0.0f));
        }
      }
      if (whole < n && whole < chunk + kChunk) {
        for (int part = 0; part < kParts; ++part) {
          // Lanes past the end of the row hold -inf and add 0 to every sum.
          const int64_t i = whole + part * Vec::size;
          const int count = n - i < 0 ? 0 : n - i < Vec::size ? static_cast<int>(n - i) : Vec::size;
          const Vec s = Vec::load_first(student_ + i, count, -kInfinity);
          add<false, Keep, true>(sums, part, i, s,
                                 kSoft ? Vec::load_first(teacher_ + i, count, -kInfinity) : Vec(0.0f));
        }
      }
      if constexpr (InRange) {
        const float high = greatest(sums.high) * factor, low = least(sums.low) * factor;
        if (!(high <= kHighestExponent && low >= kLowestExponent) && whole > 0) {
          return false;
        }
      }
      if constexpr (kSoft) {
        sums.student.flush(&sums_.soft_student);
        sums.teacher.flush(&sums_.soft_teacher);
        if constexpr (soft != Soft::mixture) {
          sums.divergence.flush(&sums_.divergence);
        }
      }
      if constexpr (hard == Hard::squares || kOwnHard) {
        sums.hard_student.flush(&sums_.hard_student);
      }
    }
    return true;
  }

  double sum_of_student() const {
    const int64_t n = task_.classes;
    double total = 0.0;
    LaneSum sum;
    for (int64_t chunk = 0; chunk < n; chunk += kChunk) {
      for (int64_t step = chunk; step < n && step < chunk + kChunk; step += kStep) {
        for (int part = 0; part < kParts; ++part) {
          const int64_t i = step + part * Vec::size;
          const int count = n - i < 0 ? 0 : n - i < Vec::size ? static_cast<int>(n - i) : Vec::size;
          const Vec s =
              count < Vec::size ? Vec::load_first(student_ + i, count, sums_.reference) : Vec::load(student_ + i);
          sum.add(part, s - reference_s_);
        }
      }
      sum.flush(&total);
    }
    return total;
  }

  struct Scales {
    Vec student, teacher, hard_student, mean_slope, spread;
    float at_label;
  };

  Vec gradient_at(int64_t i, const Scales& scales) const {
    Vec g(0.0f), e_s;
    if constexpr (soft == Soft::kl) {
      e_s = Vec::load(soft_s_ + i);
      g = e_s * scales.student - Vec::load(soft_t_ + i) * scales.teacher;
    } else if constexpr (kSoft) {
      e_s = Vec::load(soft_s_ + i);
      g = (e_s * scales.student) * (Vec::load(soft_t_ + i) - scales.mean_slope);
    }
    if constexpr (hard == Hard::squares) {
      g = g + square(e_s, task_.squarings) * scales.hard_student;
    } else if constexpr (kOwnHard) {
      g = g + Vec::load(hard_s_ + i) * scales.hard_student;
    } else if constexpr (hard == Hard::same) {
      g = g + e_s * scales.hard_student;
    }
    if constexpr (hard != Hard::none) {
      g = g - scales.spread;
    }
    return g;
  }

  /// The first `count` elements at i, which may hold the label.
  void put(int64_t i, int count, const Scales& scales) const {
    Vec g = gradient_at(i, scales);
    if constexpr (hard != Hard::none) {
      if (label_ >= i && label_ < i + count) {  // in float before the rounding to T, as the other classes
        float lanes[Vec::size];
        g.store(static_cast<float*>(lanes));
        lanes[label_ - i] -= scales.at_label;
        g = Vec::load(static_cast<const float*>(lanes));
      }
    }
    if (count < Vec::size) {
      g.store_first(grad_ + i, count);
    } else {
      g.store(grad_ + i);
    }
  }

  void write_gradient() const {
    // Equal rows have equal sums, so teacher == student gives exactly 0 for the divergence.
    Scales scales;
    const double soft_scale = weight_ * task_.soft_scale, hard_scale = weight_ * task_.hard_scale;
    const double of_slope = soft == Soft::reverse_kl ? soft_scale / static_cast<double>(task_.temperature) : soft_scale;
    const double spread = static_cast<double>(task_.label_smoothing);
    scales.student = Vec(static_cast<float>(of_slope / sums_.soft_student));
    scales.teacher = Vec(static_cast<float>(soft_scale / sums_.soft_teacher));
    scales.hard_student = Vec(static_cast<float>(hard_scale / sums_.hard_student));
    scales.mean_slope = Vec(static_cast<float>(mean_slope_));
    scales.spread = Vec(static_cast<float>(hard_scale * spread / static_cast<double>(task_.classes)));
    scales.at_label = static_cast<float>(hard_scale * (1.0 - spread));
    const int64_t n = task_.classes;
    const int64_t before_label = hard == Hard::none ? n : label_;  // these vectors need not look for it
    int64_t i = 0;
    for (; i + Vec::size <= before_label; i += Vec::size) {
      gradient_at(i, scales).store(grad_ + i);
    }
    if (i + Vec::size <= n) {
      put(i, Vec::size, scales);
      i += Vec::size;
    }
    for (; i + Vec::size <= n; i += Vec::size) {
      gradient_at(i, scales).store(grad_ + i);
    }
    if (i < n) {
      put(i, static_cast<int>(n - i), scales);
    }
  }

  const DistillationTask& task_;
  const T* student_;
  const T* teacher_;
  T* grad_;
  float* soft_s_;
  float* soft_t_;
  float* hard_s_;
  int64_t label_;
  double weight_;
  double mean_slope_ = 0.0;
  Vec reference_s_, reference_t_, soft_factor_, hard_factor_;
  DistillationSums sums_;
};

template <typename T, Soft soft, Hard hard>
DistillationSums distill(const DistillationTask& task, const DistillationRow& row) {
  return RowDistiller<T, soft, hard>(task, row).run();
}

template <typename T, Soft soft>
DistillationSums distill_with_hard(const DistillationTask& task, const DistillationRow& row) {
  if (!task.hard) {
    return distill<T, soft, Hard::none>(task, row);
  }
  if (task.squarings == 0) {
    return distill<T, soft, Hard::same>(task, row);
  }
  if (soft == Soft::kl && task.squarings > 0) {
    return distill<T, Soft::kl, Hard::squares>(task, row);
  }
  return distill<T, soft, Hard::separate>(task, row);
}

template <typename T>
DistillationSums distill_row_of(const DistillationTask& task, const DistillationRow& row) {
  if (!task.soft) {
    return distill<T, Soft::none, Hard::same>(task, row);
  }
  switch (task.divergence) {
    case Divergence::kl:
      return distill_with_hard<T, Soft::kl>(task, row);
    case Divergence::reverse_kl:
      return distill_with_hard<T, Soft::reverse_kl>(task, row);
    default:
      return distill_with_hard<T, Soft::mixture>(task, row);
  }
}

template <typename T>
void scale_range(const T* grad, T* out, float factor, int64_t begin, int64_t end) {
  const Vec by(factor);
  int64_t i = begin;
  for (; i + Vec::size <= end; i += Vec::size) {
    (Vec::load(grad + i) * by).store(out + i);
  }
  if (i < end) {
    const int count = static_cast<int>(end - i);
    (Vec::load_first(grad + i, count, 0.0f) * by).store_first(out + i, count);
  }
}

}  // namespace

DistillationSums distill_row(const DistillationTask& task, const DistillationRow& row) {
  RAREFY_FOR_FLOAT_TYPE(task.type, T, distill_row_of<T>(task, row))
}

void scale_gradient(const void* grad, void* out, FloatType type, float factor, int64_t begin, int64_t end) {
  RAREFY_FOR_FLOAT_TYPE(type, T, scale_range(static_cast<const T*>(grad), static_cast<T*>(out), factor, begin, end))
}

}  // namespace rarefy::cpu::RAREFY_ISA
