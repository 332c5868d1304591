#pragma once

#include <rarefy/export.h>

#include <cstdint>
#include <string>
#include <variant>

// How a unit of a group is scored: what importance() computes per tensor, how the tensors of a group are combined, and
// how groups are made comparable. Value types; importance.h has the computation.
namespace rarefy::pruning {

/// The L_p norm of a unit's slices, (sum |w|^p)^(1/p); max |w| for p = infinity (Li et al., 2017, arXiv:1608.08710).
struct RAREFY_API Magnitude {
  double p = 1;  // > 0, infinity included

  /// Throws c10::ValueError when a field is out of range.
  void validate() const;
  std::string to_string() const;
  bool operator==(const Magnitude&) const = default;
};

/// |gamma| of the normalization that a channel passes (network slimming, Liu et al., 2017, arXiv:1708.06519). Groups
/// without one are left alone.
struct RAREFY_API BatchNormScale {
  void validate() const {}
  std::string to_string() const;
  bool operator==(const BatchNormScale&) const = default;
};

/// The first-order change of the loss when a unit's slices become zero, from weights w and their gradients g:
///   joint      |sum w g|, the square root of equation 8 for sets of parameters in Molchanov et al., 2019,
///              arXiv:1906.10771 (the same order): contributions of opposite sign cancel, as they do in the loss
///   otherwise  sum |w g|
struct RAREFY_API Taylor {
  bool joint = true;

  void validate() const {}
  std::string to_string() const;
  bool operator==(const Taylor&) const = default;
};

/// The second-order estimate of the change of the loss, 1/2 mean (sum w g)^2 over backward passes: the Fisher
/// information of a gate on the unit's slices, sum w g being the gate's gradient (Theis et al., 2018,
/// arXiv:1801.05787, equation 7). importance() takes the gradients that are there as one pass; FisherAccumulator
/// gathers many.
struct RAREFY_API Fisher {
  void validate() const {}
  std::string to_string() const;
  bool operator==(const Fisher&) const = default;
};

/// The sum of Euclidean distances from a unit's filter to those of all other units: what lies nearest to the geometric
/// median can be replaced by the others (He et al., 2019, arXiv:1811.00250). Filters are slices of weights that
/// produce the channel.
struct RAREFY_API GeometricMedian {
  void validate() const {}
  std::string to_string() const;
  bool operator==(const GeometricMedian&) const = default;
};

/// The mean of statistics that the caller gives for the indices of a unit: mean |activation| over a calibration set.
struct RAREFY_API Activation {
  void validate() const {}
  std::string to_string() const;
  bool operator==(const Activation&) const = default;
};

/// Layer-adaptive magnitude on units: m = L_2 norm as for Magnitude, combined over the group, then
///   score(u) = m(u)^2 / sum of m(v)^2 over units v with m(v) >= m(u)
/// (Lee et al., 2021, arXiv:2010.07611). It makes groups comparable by itself; no other normalization is applied.
struct RAREFY_API Lamp {
  void validate() const {}
  std::string to_string() const;
  bool operator==(const Lamp&) const = default;
};

/// Uniform in [0, 1), a function of the seed, the group's name and the unit alone; not normalized.
struct RAREFY_API Random {
  uint64_t seed = 0;

  void validate() const {}
  std::string to_string() const;
  bool operator==(const Random&) const = default;
};

using Criterion = std::variant<Magnitude, BatchNormScale, Taylor, Fisher, GeometricMedian, Activation, Lamp, Random>;

/// Over the tensors of a group.
enum class Reduction { mean, sum, max };

/// "mean", "sum" or "max". Throws c10::ValueError for anything else.
RAREFY_API Reduction parse_reduction(const std::string& name);
RAREFY_API const char* name(Reduction reduction);

/// What the scores of a group are divided by, so that groups of other shapes compare with them: their mean, maximum or
/// sum (Fang et al., 2023, arXiv:2301.12900, section 3.4); min_max also subtracts the smallest. Scores whose divisor is
/// zero become zero.
enum class Normalization { none, mean, max, sum, min_max };

/// "none", "mean", "max", "sum" or "min_max". Throws c10::ValueError for anything else.
RAREFY_API Normalization parse_normalization(const std::string& name);
RAREFY_API const char* name(Normalization normalization);

struct RAREFY_API ImportanceOptions {
  Criterion criterion = Magnitude{};
  Reduction reduction = Reduction::mean;
  Normalization normalization = Normalization::mean;

  /// Throws c10::ValueError when a field is out of range.
  void validate() const;
};

}  // namespace rarefy::pruning
