// Rows of logits to losses and gradients, the part of distillation_loss that needs no whole tensor of logits: operators that
// make logits in chunks run it on each chunk.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <optional>

#include "ops/distillation_rule.h"

namespace rarefy::ops {

/// Checked arguments as dense rows.
struct DistillationRows {
  at::Tensor student;  // contiguous [..., classes]
  at::Tensor teacher;  // the same
  at::Tensor labels;   // contiguous int64 [...], undefined when there are none
  at::Tensor weights;  // contiguous float64 [...], undefined when every row weighs 1
  int64_t classes;
  int64_t count;        // of all rows
  double total_weight;  // of the valid rows; 0 when there is none

  /// Checks shapes, dtypes and values, as distillation_loss does; no valid row is not an error here.
  DistillationRows(const at::Tensor& student_logits, const at::Tensor& teacher_logits,
                   const std::optional<at::Tensor>& labels, const std::optional<at::Tensor>& row_weights,
                   const DistillationRule& rule);

  int64_t label(int64_t row) const { return labels.const_data_ptr<int64_t>()[row]; }
  double weight(int64_t row) const { return weights.defined() ? weights.const_data_ptr<double>()[row] : 1.0; }
  bool is_valid(int64_t row, const DistillationRule& rule) const {
    return weight(row) > 0.0 && (!labels.defined() || label(row) != rule.ignore_index);
  }
};

/// losses[row] = weight * loss of every row, 0 where it is not valid. Unless grad is undefined, writes `scale` times the
/// gradient of their sum in the student's logits to it: contiguous, with the student's shape and dtype. It may be the
/// memory of rows.student or rows.teacher itself.
void distill_rows(const DistillationRows& rows, const DistillationRule& rule, double scale, const at::Tensor& grad,
                  double* losses);

}  // namespace rarefy::ops
