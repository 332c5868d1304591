#pragma once

#include <rarefy/export.h>

#include <cstdint>
#include <string>
#include <variant>

// How pruned weights come back while the sparsity stays what the schedule says. Steps count as for schedules.
namespace rarefy::pruning {

/// How the fraction that is exchanged falls from begin to end, x = (step - begin) / (end - begin):
///   constant  fraction;   linear  fraction * (1 - x);   cosine  fraction * (1 + cos(pi * x)) / 2
enum class Decay { constant, linear, cosine };

/// "constant", "linear" or "cosine". Throws c10::ValueError for anything else.
RAREFY_API Decay parse_decay(const std::string& name);
RAREFY_API const char* name(Decay decay);

/// Sparse evolutionary training (Mocanu et al., 2018, arXiv:1707.04780): at begin + every, begin + 2 * every, ... before
/// `end`, each tensor drops the fraction of its kept weights with the lowest scores and grows as many at random among
/// those that are not kept then. Random numbers depend on seed, step, the parameter's name and the element alone. A weight
/// that grows starts at 0; one that is dropped and drawn at once has not been away and keeps its value.
struct RAREFY_API SET {
  int64_t begin = 0;            // >= 0
  int64_t end = 1;              // > begin; no exchange from here on
  int64_t every = 100;          // steps between exchanges, > 0
  double fraction = 0.3;        // of a tensor's kept weights, in (0, 1]
  Decay decay = Decay::cosine;  // of the fraction
  uint64_t seed = 0;

  /// Throws c10::ValueError when a field is out of range.
  void validate() const;
  bool updates_at(int64_t step) const;
  /// The fraction that is exchanged at `step`.
  double fraction_at(int64_t step) const;
  std::string to_string() const;
  bool operator==(const SET&) const = default;
};

/// The rigged lottery (Evci et al., 2020, arXiv:1911.11134): as SET, but what grows has the largest gradients. Those are the
/// gradients of this step, dense, as the backward pass left them.
struct RAREFY_API RigL {
  int64_t begin = 0;            // >= 0
  int64_t end = 1;              // > begin; no exchange from here on. The paper: 3/4 of training
  int64_t every = 100;          // steps between exchanges, > 0
  double fraction = 0.3;        // of a tensor's kept weights, in (0, 1]
  Decay decay = Decay::cosine;  // of the fraction

  void validate() const;
  bool updates_at(int64_t step) const;
  double fraction_at(int64_t step) const;
  std::string to_string() const;
  bool operator==(const RigL&) const = default;
};

/// Soft masks: up to `end`, the optimizer works on dense weights. The forward pass sees w * mask, and the gradient with
/// respect to w * mask is taken for that of w (straight-through), so pruned weights go on learning and come back when they
/// score high enough: masks are chosen anew from all dense weights at the schedule's updates, every `every` steps from the
/// schedule's first on, and at `end`, from where on masks are fixed and pruned weights are gone.
/// `decay` adds decay * w to the gradients of the weights that are pruned (SR-STE, Zhou et al., 2021, arXiv:2102.04010).
struct RAREFY_API StraightThrough {
  int64_t end = 1;    // > 0; not before the schedule's last update
  int64_t every = 1;  // steps between choices, > 0
  double decay = 0;   // >= 0

  void validate() const;
  bool updates_at(int64_t step) const;
  std::string to_string() const;
  bool operator==(const StraightThrough&) const = default;
};

using Regrowth = std::variant<SET, RigL, StraightThrough>;

}  // namespace rarefy::pruning
