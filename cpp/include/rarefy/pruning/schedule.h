#pragma once

#include <rarefy/export.h>

#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <variant>
#include <vector>

// When masks are updated, and how far. Steps count completed optimizer steps: 1 after the first one; 0 is the model
// before it. Every schedule has
//   validate()                  throws c10::ValueError when a field is out of range
//   sparsity_at(step, final)    the sparsity after an update at `step`, for a pruner whose target is `final`
//   updates_at(step)            true when masks are updated at `step`
//   last_update()               the last such step, where the sparsity is exactly `final`; -1 without any
// and those that let pruned elements come back have
//   releases_at(step)           true when what is pruned competes again at this update; elsewhere masks only grow
namespace rarefy::pruning {

/// The final sparsity from step `begin` on, 0 before it: one mask update ("one-shot").
struct RAREFY_API ConstantSchedule {
  int64_t begin = 0;  // >= 0

  void validate() const;
  double sparsity_at(int64_t step, double final_sparsity) const;
  bool updates_at(int64_t step) const;
  int64_t last_update() const { return begin; }
  std::string to_string() const;
  bool operator==(const ConstantSchedule&) const = default;
};

/// Masks are never updated: those that the model has, or is loaded with, hold.
struct RAREFY_API FixedSchedule {
  void validate() const {}
  double sparsity_at(int64_t, double final_sparsity) const { return final_sparsity; }
  bool updates_at(int64_t) const { return false; }
  int64_t last_update() const { return -1; }
  std::string to_string() const { return "FixedSchedule()"; }
  bool operator==(const FixedSchedule&) const = default;
};

// The next four rise from `initial` at `begin` to exactly the final sparsity at `end`, are 0 before `begin`, and are
// updated at begin, begin + every, begin + 2 * every, ... and always at `end`, whether or not `every` divides the length.
// x = (step - begin) / (end - begin).

/// Evenly: s = initial + (final - initial) * x.
struct RAREFY_API LinearSchedule {
  int64_t begin = 0;   // first step, >= 0
  int64_t end = 1;     // last step, > begin
  int64_t every = 1;   // steps between updates, > 0
  double initial = 0;  // sparsity at begin, in [0, 1)

  void validate() const;
  double sparsity_at(int64_t step, double final_sparsity) const;
  bool updates_at(int64_t step) const;
  int64_t last_update() const { return end; }
  std::string to_string() const;
  bool operator==(const LinearSchedule&) const = default;
};

/// Along a polynomial, fast first and slowly at the end: s = final + (initial - final) * (1 - x)^power (automated gradual
/// pruning, Zhu & Gupta, 2017, arXiv:1710.01878, equation 1, power 3).
struct RAREFY_API PolynomialSchedule {
  int64_t begin = 0;   // first step, >= 0
  int64_t end = 1;     // last step, > begin
  int64_t every = 1;   // steps between updates, > 0
  double initial = 0;  // sparsity at begin, in [0, 1)
  double power = 3;    // > 0; 1 is linear

  void validate() const;
  double sparsity_at(int64_t step, double final_sparsity) const;
  bool updates_at(int64_t step) const;
  int64_t last_update() const { return end; }
  std::string to_string() const;
  bool operator==(const PolynomialSchedule&) const = default;
};

/// Slowly at both ends: s = final + (initial - final) * (1 + cos(pi * x)) / 2.
struct RAREFY_API CosineSchedule {
  int64_t begin = 0;   // first step, >= 0
  int64_t end = 1;     // last step, > begin
  int64_t every = 1;   // steps between updates, > 0
  double initial = 0;  // sparsity at begin, in [0, 1)

  void validate() const;
  double sparsity_at(int64_t step, double final_sparsity) const;
  bool updates_at(int64_t step) const;
  int64_t last_update() const { return end; }
  std::string to_string() const;
  bool operator==(const CosineSchedule&) const = default;
};

/// The same fraction of what is left in equal times: 1 - s = (1 - initial) * ((1 - final) / (1 - initial))^x.
struct RAREFY_API ExponentialSchedule {
  int64_t begin = 0;   // first step, >= 0
  int64_t end = 1;     // last step, > begin
  int64_t every = 1;   // steps between updates, > 0
  double initial = 0;  // sparsity at begin, in [0, 1)

  void validate() const;
  double sparsity_at(int64_t step, double final_sparsity) const;
  bool updates_at(int64_t step) const;
  int64_t last_update() const { return end; }
  std::string to_string() const;
  bool operator==(const ExponentialSchedule&) const = default;
};

/// Gradual pruning again and again: the steps after `begin` up to `end` are split into `cycles` of equal length (to a
/// step); each begins dense and ends at the final sparsity, along PolynomialSchedule's curve. What one cycle pruned starts
/// the next one from zero (Srinivas et al., 2022, arXiv:2202.01290).
/// Updates come at the first step of a cycle, every `every` after that, and always at its last.
struct RAREFY_API CyclicSchedule {
  int64_t begin = 0;   // the first cycle starts after it, >= 0
  int64_t end = 2;     // last step; at least 2 steps per cycle
  int64_t cycles = 1;  // > 0
  int64_t every = 1;   // steps between updates, > 0
  double power = 3;    // > 0

  void validate() const;
  double sparsity_at(int64_t step, double final_sparsity) const;
  bool updates_at(int64_t step) const;
  bool releases_at(int64_t step) const;
  int64_t last_update() const { return end; }
  std::string to_string() const;
  bool operator==(const CyclicSchedule&) const = default;
};

/// Alternating compressed and decompressed training (Peste et al., 2021, arXiv:2106.12379). From `begin` on, `sparse` steps
/// at the final sparsity and `dense` steps without masks take turns; from `end` on the model stays sparse. The masks of a
/// sparse phase are chosen at its first step, from the dense weights; at the first step of a dense phase all weights are
/// free again, the pruned ones from zero.
struct RAREFY_API ACDC {
  int64_t begin = 0;   // first step of the first sparse phase, >= 0: the steps before it are the dense warm-up
  int64_t end = 1;     // first step of the last sparse phase, > begin
  int64_t sparse = 1;  // steps, > 0
  int64_t dense = 1;   // steps, > 0

  void validate() const;
  double sparsity_at(int64_t step, double final_sparsity) const;
  bool updates_at(int64_t step) const;
  bool releases_at(int64_t step) const { return updates_at(step); }
  int64_t last_update() const;
  std::string to_string() const;
  bool operator==(const ACDC&) const = default;

 private:
  bool is_sparse(int64_t step) const;
};

/// What goes back to an earlier time when Iterative prunes: nothing, the weights (Frankle et al., 2020, arXiv:1912.05671), or
/// the learning rate alone (Renda et al., 2020, arXiv:2003.02389).
enum class Rewind { none, weights, learning_rate };

/// "none", "weights" or "learning_rate". Throws c10::ValueError for anything else.
RAREFY_API Rewind parse_rewind(const std::string& name);
RAREFY_API const char* name(Rewind rewind);

/// Train, prune, rewind, again: `rounds` updates, each of which prunes the same fraction of what is left,
///   1 - s = (1 - final)^(round / rounds).
/// `steps_per_round` is the length of the training schedule. The first update is at its end; with rewinding, training then
/// is at step `rewind_to` of its schedule again (training_step()) and gets back to the end in steps_per_round - rewind_to
/// steps, when the next update comes. Rewinding of weights sets all parameters and buffers of the model to what they were
/// after step `rewind_to`, then masks them.
struct RAREFY_API Iterative {
  int64_t rounds = 1;            // > 0
  int64_t steps_per_round = 1;   // > 0
  Rewind rewind = Rewind::none;  // what goes back
  int64_t rewind_to = 0;         // step of the training schedule, in [0, steps_per_round); 0 unless something goes back

  void validate() const;
  double sparsity_at(int64_t step, double final_sparsity) const;
  bool updates_at(int64_t step) const;
  int64_t last_update() const;
  /// Where training is in its own schedule after `step` steps; a learning rate is a function of this.
  int64_t training_step(int64_t step) const;
  std::string to_string() const;
  bool operator==(const Iterative&) const = default;

 private:
  int64_t round_at(int64_t step) const;  // updates made up to and including `step`
};

/// A sparsity that a function gives. The last of the updates has exactly the final sparsity, whatever it says.
struct RAREFY_API CustomSchedule {
  using Function = std::function<double(int64_t step)>;

  std::shared_ptr<const Function> function;  // step to sparsity in [0, 1); called at updates, and by plots
  std::vector<int64_t> updates;              // ascending, >= 0, not empty
  bool regrow = false;                       // what is pruned competes again at each update, so sparsity may fall

  void validate() const;
  /// Throws c10::ValueError when the function's value is not in [0, 1).
  double sparsity_at(int64_t step, double final_sparsity) const;
  bool updates_at(int64_t step) const;
  bool releases_at(int64_t step) const { return regrow && updates_at(step); }
  int64_t last_update() const { return updates.back(); }
  std::string to_string() const;
  /// The same function object, and equal updates.
  bool operator==(const CustomSchedule&) const = default;
};

using Schedule = std::variant<ConstantSchedule, FixedSchedule, LinearSchedule, PolynomialSchedule, CosineSchedule,
                              ExponentialSchedule, CyclicSchedule, ACDC, Iterative, CustomSchedule>;

// The same over the variant.
RAREFY_API void validate(const Schedule& schedule);
RAREFY_API double sparsity_at(const Schedule& schedule, int64_t step, double final_sparsity);
RAREFY_API bool updates_at(const Schedule& schedule, int64_t step);
RAREFY_API bool releases_at(const Schedule& schedule, int64_t step);
RAREFY_API int64_t last_update(const Schedule& schedule);
RAREFY_API std::string to_string(const Schedule& schedule);

}  // namespace rarefy::pruning
