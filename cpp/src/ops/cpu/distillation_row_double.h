// One row of distillation_loss in float64.
#pragma once

#include <cstdint>
#include <vector>

#include "ops/distillation_rule.h"

namespace rarefy::ops {

/// The formulas of docs/dev/numerics.md in plain loops: for gradient checks and reference runs, where speed is not the point.
class DoubleRowDistiller {
 public:
  DoubleRowDistiller(const DistillationRule& rule, int64_t classes);

  /// The loss of a row; writes `scale` times its gradient to grad unless that is null. grad may be student or teacher.
  double run(const double* student, const double* teacher, int64_t label, double scale, double* grad);

 private:
  double soft(const double* student, const double* teacher);
  double hard(const double* student, int64_t label, double scale, double* grad) const;

  const DistillationRule& rule_;
  int64_t classes_;
  std::vector<double> log_q_;
  std::vector<double> log_p_;
  std::vector<double> slope_;  // q (dD/dq - sum q dD/dq): T times the divergence's gradient in the student's logits
};

}  // namespace rarefy::ops
