#include "ops/cpu/distillation_loss_simd.h"

#include "ops/cpu/simd.h"

namespace rarefy::cpu::RAREFY_ISA {
namespace {

// Sixteen elements are one step in every instruction set (one or two vectors), and lane i % 16 adds element i, so that
// sums are the same bits whatever the width of a vector. After kChunk elements the lanes go to a double.
constexpr int kStep = 16;
constexpr int kParts = kStep / Vec::size;
constexpr int64_t kChunk = 1024;
constexpr float kLowestNormal = 1.17549435e-38f;
constexpr float kInfinity = __builtin_inff();

/// One vector at p, of which the row has `count` more elements.
template <typename T>
inline Vec load_part(const T* p, int64_t count) {
  // Lanes past the row's end hold -inf: they add 0 to every sum.
  return count >= Vec::size ? Vec::load(p) : load_tail(p, count, -kInfinity);
}

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
    double sum = 0.0;
    for (float value : values) {
      sum += static_cast<double>(value);
    }
    *total += sum;
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

template <typename T>
float row_max(const T* x, int64_t n) {
  // Four accumulators hide the latency of max. A NaN is passed over here and shows in the sums.
  Vec best[4] = {Vec(-kInfinity), Vec(-kInfinity), Vec(-kInfinity), Vec(-kInfinity)};
  int64_t i = 0;
  for (; i + 4 * Vec::size <= n; i += 4 * Vec::size) {
    for (int k = 0; k < 4; ++k) {
      best[k] = max(Vec::load(x + i + k * Vec::size), best[k]);
    }
  }
  for (; i < n; i += Vec::size) {
    best[0] = max(load_part(x + i, n - i), best[0]);
  }
  float lanes[Vec::size];
  max(max(best[0], best[1]), max(best[2], best[3])).store(static_cast<float*>(lanes));
  float result = lanes[0];
  for (float lane : lanes) {
    result = lane > result ? lane : result;
  }
  return result;
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

template <typename T, bool Soft, Hard hard>
DistillationSums distill(const DistillationTask& task, const DistillationRow& row) {
  const auto* student = static_cast<const T*>(row.student);
  const auto* teacher = static_cast<const T*>(row.teacher);
  const int64_t n = task.classes;
  const int64_t padded = (n + kStep - 1) / kStep * kStep;
  float* soft_s = row.scratch;
  float* soft_t = row.scratch + padded;
  float* hard_s = row.scratch + 2 * padded;
  const bool keep_values = row.grad != nullptr;

  DistillationSums sums{};
  sums.student_max = row_max(student, n);
  const Vec max_s(sums.student_max);
  const Vec max_t(Soft ? row_max(teacher, n) : 0.0f);
  const Vec inverse_temperature(task.inverse_temperature);
  LaneSum student_sum, teacher_sum, cross_sum, hard_sum;
  for (int64_t chunk = 0; chunk < n; chunk += kChunk) {
    const int64_t end = chunk + kChunk < n ? chunk + kChunk : n;
    for (int64_t step = chunk; step < end; step += kStep) {
      for (int part = 0; part < kParts; ++part) {
        const int64_t i = step + part * Vec::size;
        const Vec s = load_part(student + i, n - i) - max_s;
        Vec e_s;
        if constexpr (Soft) {
          const Vec t = load_part(teacher + i, n - i) - max_t;
          e_s = exp_nonpositive(s * inverse_temperature);
          const Vec e_t = exp_nonpositive(t * inverse_temperature);
          student_sum.add(part, e_s);
          teacher_sum.add(part, e_t);
          // A class without teacher mass adds nothing, even where t - s is not a number.
          cross_sum.add(part, zero_below(e_t, Vec(kLowestNormal), e_t * (t - s)));
          if (keep_values) {
            e_s.store(soft_s + i);
            e_t.store(soft_t + i);
          }
        }
        if constexpr (hard == Hard::squares) {
          hard_sum.add(part, square(e_s, task.squarings));
        } else if constexpr (hard == Hard::separate || (hard == Hard::same && !Soft)) {
          const Vec e = exp_nonpositive(s);
          hard_sum.add(part, e);
          if (keep_values) {
            e.store(hard_s + i);
          }
        }
      }
    }
    if constexpr (Soft) {
      student_sum.flush(&sums.soft_student);
      teacher_sum.flush(&sums.soft_teacher);
      cross_sum.flush(&sums.cross);
    }
    if constexpr (hard != Hard::none && !(hard == Hard::same && Soft)) {
      hard_sum.flush(&sums.hard_student);
    }
  }
  if constexpr (hard == Hard::same && Soft) {
    sums.hard_student = sums.soft_student;
  }
  if constexpr (hard != Hard::none) {
    sums.label_logit = to_float(student[row.label]);
  }
  if (!keep_values) {
    return sums;
  }

  // Equal rows have equal sums, so teacher == student gives exactly 0 for the KL term.
  const float scale_s = Soft ? static_cast<float>(task.soft_scale / sums.soft_student) : 0.0f;
  const float scale_t = Soft ? static_cast<float>(task.soft_scale / sums.soft_teacher) : 0.0f;
  const float scale_h = hard != Hard::none ? static_cast<float>(task.hard_scale / sums.hard_student) : 0.0f;
  const auto gradient_at = [&](int64_t i) {
    Vec g(0.0f), e_s;
    if constexpr (Soft) {
      e_s = Vec::load(soft_s + i);
      g = e_s * Vec(scale_s) - Vec::load(soft_t + i) * Vec(scale_t);
    }
    if constexpr (hard != Hard::none) {
      Vec e;
      if constexpr (hard == Hard::squares) {
        e = square(e_s, task.squarings);
      } else if constexpr (hard == Hard::same && Soft) {
        e = e_s;
      } else {
        e = Vec::load(hard_s + i);
      }
      g = g + e * Vec(scale_h);
    }
    return g;
  };
  auto* grad = static_cast<T*>(row.grad);
  int64_t i = 0;
  for (; i + Vec::size <= n; i += Vec::size) {
    gradient_at(i).store(grad + i);
  }
  if (i < n) {
    store_tail(gradient_at(i), grad + i, n - i);
  }
  if constexpr (hard != Hard::none) {
    // In float before the rounding to T, as the other classes.
    float lanes[Vec::size];
    const int64_t first = row.label / Vec::size * Vec::size;
    gradient_at(first).store(static_cast<float*>(lanes));
    from_float(lanes[row.label - first] - static_cast<float>(task.hard_scale), grad + row.label);
  }
  return sums;
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
    store_tail(load_tail(grad + i, end - i, 0.0f) * by, out + i, end - i);
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
