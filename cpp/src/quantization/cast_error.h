// What casts to a minifloat cost, and the ranges where they cost least.
#pragma once

#include <ATen/core/Tensor.h>
#include <rarefy/quantization/format.h>

#include <cstdint>
#include <string>

namespace rarefy::quantization {

/// The error of casts to a minifloat with one scale for each row.
class CastError {
 public:
  CastError(const Minifloat& format, bool power_of_two, double norm, double clip_weight);

  /// The scales of ranges that reach from -end to end, [rows].
  at::Tensor scale(const at::Tensor& end) const;

  /// The sums of weights * error over the rows of x, float64: in one order, whatever the number of threads.
  at::Tensor operator()(const at::Tensor& x, const at::Tensor& weights, const at::Tensor& end) const;

  /// For each row of x the index of the first of its `ends` [rows, k] with the least error, -1 where none is below `least`
  /// [rows], float64, which is lowered.
  at::Tensor cheapest(const at::Tensor& x, const at::Tensor& weights, const at::Tensor& ends, at::Tensor& least) const;
  /// Whether `cheapest` is one kernel that casts, measures and adds, row by row.
  bool is_fused(const at::Tensor& x, const at::Tensor& weights) const;

  bool power_of_two() const { return power_of_two_; }

 private:
  Minifloat format_;
  bool power_of_two_;
  double norm_, clip_weight_;
  std::string specials_;
};

/// The ends in [0, largest] with the least error of each row of x [rows, n]: as the search for integers (ops/narrowing.h) goes
/// through them, all rows at once.
at::Tensor best_ends(const at::Tensor& x, const at::Tensor& weights, const CastError& error, int64_t steps);

}  // namespace rarefy::quantization
