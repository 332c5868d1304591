// The inner loops of distillation_loss on one row of logits. No ATen here.
#pragma once

#include <stdint.h>

#include "ops/cpu/float_type.h"
#include "ops/cpu/isa.h"
#include "ops/divergence.h"

namespace rarefy::cpu {

/// What is the same for every row. `soft` turns the divergence on, `hard` the cross-entropy term.
struct DistillationTask {
  FloatType type;
  int64_t classes;
  bool soft;
  bool hard;
  Divergence divergence;
  float skew;
  float label_smoothing;
  /// How e^x follows from e^(x / T): 0 when T is 1, k when T is 2^k (k squarings), -1 when it needs an exponential.
  int squarings;
  float temperature;
  float soft_factor;  // log2(e) / T: e^(x / T) = 2^(x * soft_factor)
  /// The gradient is soft_scale * (T times that of the divergence) + hard_scale * (that of the cross-entropy).
  double soft_scale;
  double hard_scale;
};

struct DistillationRow {
  const void* student;
  const void* teacher;
  void* grad;      // null when only the sums are wanted; may be student or teacher
  float* scratch;  // distillation_scratch(classes) floats
  int64_t label;   // in [0, classes); unused without the hard term
  double weight;   // of the row's gradient
};

/// Sums over a row with student logits s, teacher logits t, temperature T, and numbers r_s and r_t near their maxima.
struct DistillationSums {
  float reference;      // r_s
  float label_logit;    // s[label]
  double soft_student;  // sum of e^((s - r_s) / T)
  double soft_teacher;  // sum of e^((t - r_t) / T)
  double hard_student;  // sum of e^(s - r_s)
  /// kl: sum of e^((t - r_t) / T) * d, and reverse_kl: sum of e^((s - r_s) / T) * -d, both with d = (t - r_t) - (s - r_s) and
  /// without the terms where the first factor is 0. The other divergences: their value.
  double divergence;
  double student_sum;  // sum of s - r_s; 0 without label smoothing
};

inline int64_t distillation_scratch(int64_t classes) { return 3 * ((classes + 15) / 16 * 16); }

RAREFY_DECLARE_ISA(
    /// The sums of a row and, unless row.grad is null, its gradient; the row is read from memory once.
    /// Rows of a matrix are best taken in order: the next one is fetched meanwhile.
    DistillationSums distill_row(const DistillationTask& task, const DistillationRow& row);

    /// out = factor * grad for elements [begin, end).
    void scale_gradient(const void* grad, void* out, FloatType type, float factor, int64_t begin, int64_t end);)

}  // namespace rarefy::cpu
