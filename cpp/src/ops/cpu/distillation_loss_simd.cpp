#include "ops/cpu/distillation_loss_simd.h"

#include "ops/cpu/simd_math.h"

namespace rarefy::cpu::RAREFY_ISA {
namespace {

// Sixteen elements are one step in every instruction set (one or two vectors), and lane i % 16 adds element i, so that
// sums are the same bits whatever the width of a vector. After kChunk elements the lanes go to a double.
constexpr int kStep = 16;
constexpr int kParts = kStep / Vec::size;
constexpr int64_t kChunk = 1024;
constexpr float kLowestNormal = 1.17549435e-38f;
constexpr float kInfinity = __builtin_inff();
constexpr float kLog2E = 1.44269504f;

class LaneSum {
 public:
  LaneSum() { clear(); }
  void add(int part, Vec value) { lanes_[part] = lanes_[part] + value; }
  /// Adds the lanes in order to `total` and starts anew.
  void flush(double* total) {
    float values[kStep];
    for (int part = 0; part < kParts; ++part) {
      lanes_[part].store(values + part * Vec::size);
    }
    double sums[4] = {0.0, 0.0, 0.0, 0.0};  // four chains instead of one of sixteen additions
    for (int lane = 0; lane < kStep; lane += 4) {
      for (int k = 0; k < 4; ++k) {
        sums[k] += static_cast<double>(values[lane + k]);
      }
    }
    *total += (sums[0] + sums[1]) + (sums[2] + sums[3]);
    clear();
  }

 private:
  void clear() {
    for (Vec& lane : lanes_) {
      lane = Vec(0.0f);
    }
  }
  Vec lanes_[kParts];
};

struct Range {
  float max;
  float min;
};

template <typename T>
Range row_range(const T* x, int64_t n) {
  // Four accumulators hide the latency of max and min. A NaN is passed over here and shows in the sums.
  Vec high[4], low[4];
  for (int k = 0; k < 4; ++k) {
    high[k] = Vec(-kInfinity);
    low[k] = Vec(kInfinity);
  }
  int64_t i = 0;
  for (; i + 4 * Vec::size <= n; i += 4 * Vec::size) {
    for (int k = 0; k < 4; ++k) {
      const Vec value = Vec::load(x + i + k * Vec::size);
      high[k] = max(value, high[k]);
      low[k] = min(value, low[k]);
    }
  }
  float lanes_high[Vec::size], lanes_low[Vec::size];
  max(max(high[0], high[1]), max(high[2], high[3])).store(static_cast<float*>(lanes_high));
  min(min(low[0], low[1]), min(low[2], low[3])).store(static_cast<float*>(lanes_low));
  Range range{-kInfinity, kInfinity};
  for (int k = 0; k < Vec::size; ++k) {
    range.max = lanes_high[k] > range.max ? lanes_high[k] : range.max;
    range.min = lanes_low[k] < range.min ? lanes_low[k] : range.min;
  }
  for (; i < n; ++i) {
    const float value = to_float(x[i]);
    range.max = value > range.max ? value : range.max;
    range.min = value < range.min ? value : range.min;
  }
  return range;
}

inline Vec square(Vec x, int times) {
  for (; times > 0; --times) {
    x = x * x;
  }
  return x;
}

/// Where e^s for the cross-entropy comes from.
enum class Hard {
  none,      // no such term
  same,      // T is 1, or there is no KL term: the one exponential
  squares,   // T is a power of 2: the KL term's exponential, squared
  separate,  // its own exponential
};

/// One row. The exponentials are kept in row.scratch between the sums and the gradient.
template <typename T, bool Soft, Hard hard>
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
    const Range student = row_range(student_, task_.classes);
    const Range teacher = Soft ? row_range(teacher_, task_.classes) : student;
    max_s_ = Vec(student.max);
    max_t_ = Vec(teacher.max);
    soft_factor_ = Vec(task_.soft_factor);
    hard_factor_ = Vec(kLog2E);
    // Most rows have no exponential that underflows: those need no clamping.
    const float factor = hard != Hard::none && task_.soft_factor < kLog2E ? kLog2E : task_.soft_factor;
    const float widest =
        student.max - student.min > teacher.max - teacher.min ? student.max - student.min : teacher.max - teacher.min;
    sums_ = DistillationSums{};
    sums_.student_max = student.max;
    if (widest * factor < 125.0f) {
      grad_ == nullptr ? accumulate<true, false>() : accumulate<true, true>();
    } else {
      grad_ == nullptr ? accumulate<false, false>() : accumulate<false, true>();
    }
    if constexpr (hard == Hard::same && Soft) {
      sums_.hard_student = sums_.soft_student;
    }
    if constexpr (hard != Hard::none) {
      sums_.label_logit = to_float(student_[label_]);
    }
    if (grad_ != nullptr) {
      write_gradient();
    }
    return sums_;
  }

 private:
  static constexpr bool kOwnHard = hard == Hard::separate || (hard == Hard::same && !Soft);

  template <bool Bounded>
  static Vec exponential(Vec x) {
    if constexpr (Bounded) {
      return exp2_bounded(x);
    } else {
      return exp2_nonpositive(x);
    }
  }

  struct Sums {
    LaneSum student, teacher, cross, hard_student;
  };

  /// Adds the vector of logits s, t at element i, the part-th vector of its step.
  template <bool Bounded, bool Keep>
  void add(Sums& lanes, int part, int64_t i, Vec s, Vec t) {
    const Vec us = s - max_s_;
    Vec e_s;
    if constexpr (Soft) {
      const Vec ut = t - max_t_;
      e_s = exponential<Bounded>(us * soft_factor_);
      const Vec e_t = exponential<Bounded>(ut * soft_factor_);
      const Vec cross = e_t * (ut - us);
      lanes.student.add(part, e_s);
      lanes.teacher.add(part, e_t);
      // A class without teacher mass adds nothing, even where t - s is not a number.
      lanes.cross.add(part, Bounded ? cross : zero_below(e_t, Vec(kLowestNormal), cross));
      if constexpr (Keep) {
        e_s.store(soft_s_ + i);
        e_t.store(soft_t_ + i);
      }
    }
    if constexpr (hard == Hard::squares) {
      lanes.hard_student.add(part, square(e_s, task_.squarings));
    } else if constexpr (kOwnHard) {
      const Vec e = exponential<Bounded>(us * hard_factor_);
      lanes.hard_student.add(part, e);
      if constexpr (Keep) {
        e.store(hard_s_ + i);
      }
    }
  }

  /// Asks for the same place in the next row: memory works while this row is computed. Past the last row it does nothing.
  template <int Write>
  void prefetch_next(const T* p) const {
    __builtin_prefetch(reinterpret_cast<const void*>(reinterpret_cast<uintptr_t>(p) +
                                                     static_cast<uintptr_t>(task_.classes) * sizeof(T)),
                       Write, 2);
  }

  template <bool Bounded, bool Keep>
  void accumulate() {
    const int64_t n = task_.classes;
    const int64_t whole = n / kStep * kStep;
    Sums lanes;
    for (int64_t chunk = 0; chunk < n; chunk += kChunk) {
      const int64_t end = chunk + kChunk < whole ? chunk + kChunk : whole;
      for (int64_t step = chunk; step < end; step += kStep) {
        prefetch_next<0>(student_ + step);
        if constexpr (Soft) {
          prefetch_next<0>(teacher_ + step);
        }
        if constexpr (Keep) {
          prefetch_next<1>(grad_ + step);
        }
        for (int part = 0; part < kParts; ++part) {
          const int64_t i = step + part * Vec::size;
          add<Bounded, Keep>(lanes, part, i, Vec::load(student_ + i), Soft ? Vec::load(teacher_ + i) : Vec(0.0f));
        }
      }
      if (whole < n && whole < chunk + kChunk) {
        for (int part = 0; part < kParts; ++part) {
          // Lanes past the end of the row hold -inf and add 0 to every sum.
          const int64_t i = whole + part * Vec::size;
          const int count = n - i < 0 ? 0 : n - i < Vec::size ? static_cast<int>(n - i) : Vec::size;
          add<false, Keep>(lanes, part, i, Vec::load_first(student_ + i, count, -kInfinity),
                           Soft ? Vec::load_first(teacher_ + i, count, -kInfinity) : Vec(0.0f));
        }
      }
      if constexpr (Soft) {
        lanes.student.flush(&sums_.soft_student);
        lanes.teacher.flush(&sums_.soft_teacher);
        lanes.cross.flush(&sums_.cross);
      }
      if constexpr (hard == Hard::squares || kOwnHard) {
        lanes.hard_student.flush(&sums_.hard_student);
      }
    }
  }

  struct Scales {
    Vec student, teacher, hard_student;
  };

  Vec gradient_at(int64_t i, const Scales& scales) const {
    Vec g(0.0f), e_s;
    if constexpr (Soft) {
      e_s = Vec::load(soft_s_ + i);
      g = e_s * scales.student - Vec::load(soft_t_ + i) * scales.teacher;
    }
    if constexpr (hard == Hard::squares) {
      g = g + square(e_s, task_.squarings) * scales.hard_student;
    } else if constexpr (kOwnHard) {
      g = g + Vec::load(hard_s_ + i) * scales.hard_student;
    } else if constexpr (hard == Hard::same) {
      g = g + e_s * scales.hard_student;
    }
    return g;
  }

  void write_gradient() {
    // Equal rows have equal sums, so teacher == student gives exactly 0 for the KL term.
    Scales scales;
    scales.student = Vec(static_cast<float>(weight_ * task_.soft_scale / sums_.soft_student));
    scales.teacher = Vec(static_cast<float>(weight_ * task_.soft_scale / sums_.soft_teacher));
    scales.hard_student = Vec(static_cast<float>(weight_ * task_.hard_scale / sums_.hard_student));
    const int64_t n = task_.classes;
    int64_t i = 0;
    for (; i + Vec::size <= n; i += Vec::size) {
      gradient_at(i, scales).store(grad_ + i);
    }
    if (i < n) {
      gradient_at(i, scales).store_first(grad_ + i, static_cast<int>(n - i));
    }
    if constexpr (hard != Hard::none) {
      // In float before the rounding to T, as the other classes.
      float lanes[Vec::size];
      const int64_t first = label_ / Vec::size * Vec::size;
      gradient_at(first, scales).store(static_cast<float*>(lanes));
      from_float(lanes[label_ - first] - static_cast<float>(weight_ * task_.hard_scale), grad_ + label_);
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
  Vec max_s_, max_t_, soft_factor_, hard_factor_;
  DistillationSums sums_;
};

template <typename T, bool Soft, Hard hard>
DistillationSums distill(const DistillationTask& task, const DistillationRow& row) {
  return RowDistiller<T, Soft, hard>(task, row).run();
}

template <typename T>
DistillationSums distill_row_of(const DistillationTask& task, const DistillationRow& row) {
  if (!task.soft) {
    return distill<T, false, Hard::same>(task, row);
  }
  if (!task.hard) {
    return distill<T, true, Hard::none>(task, row);
  }
  if (task.squarings == 0) {
    return distill<T, true, Hard::same>(task, row);
  }
  return task.squarings > 0 ? distill<T, true, Hard::squares>(task, row) : distill<T, true, Hard::separate>(task, row);
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
