#pragma once

#include <rarefy/export.h>

#include <cstdint>
#include <string>
#include <variant>

namespace rarefy::pruning {

/// The final sparsity from step `begin` on, 0 before it: one mask update.
struct RAREFY_API ConstantSchedule {
  int64_t begin = 0;  // >= 0

  /// Throws c10::ValueError when a field is out of range.
  void validate() const;
  double sparsity_at(int64_t step, double final_sparsity) const;
  bool updates_at(int64_t step) const;
  std::string to_string() const;
  bool operator==(const ConstantSchedule&) const = default;
};

/// A sparsity that rises along a polynomial, fast first and slowly at the end:
///
///   s(t) = final + (initial - final) * (1 - (t - begin) / (end - begin))^power        for begin <= t <= end
///
/// 0 before `begin`, exactly `final` from `end` on (Zhu & Gupta, 2017, arXiv:1710.01878, equation 1, power 3). Masks
/// are updated at begin, begin + every, begin + 2 * every, ... and always at `end`, so that the final sparsity is
/// reached exactly there whether or not `every` divides the length.
struct RAREFY_API PolynomialSchedule {
  int64_t begin = 0;   // first step, >= 0
  int64_t end = 1;     // last step, > begin
  int64_t every = 1;   // steps between updates, > 0
  double initial = 0;  // sparsity at begin, in [0, 1)
  double power = 3;    // > 0; 1 is linear

  /// Throws c10::ValueError when a field is out of range.
  void validate() const;
  double sparsity_at(int64_t step, double final_sparsity) const;
  bool updates_at(int64_t step) const;
  std::string to_string() const;
  bool operator==(const PolynomialSchedule&) const = default;
};

/// Steps count completed optimizer steps: 1 after the first one; 0 is the model before it.
using Schedule = std::variant<ConstantSchedule, PolynomialSchedule>;

}  // namespace rarefy::pruning
