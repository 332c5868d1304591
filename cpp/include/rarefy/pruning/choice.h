#pragma once

#include <ATen/core/Tensor.h>
#include <rarefy/export.h>
#include <rarefy/pruning/counts.h>
#include <rarefy/pruning/importance.h>
#include <rarefy/pruning/structure.h>

#include <cstdint>
#include <optional>
#include <string>
#include <utility>
#include <variant>
#include <vector>

namespace rarefy::pruning {

/// The fraction of units to remove, in [0, 1), of all groups together.
struct RAREFY_API Channels {
  double fraction = 0;

  /// Throws c10::ValueError when the fraction is out of range.
  void validate() const;
  std::string to_string() const;
  bool operator==(const Channels&) const = default;
};

/// The fraction of the model's parameter elements to remove, in [0, 1).
struct RAREFY_API Parameters {
  double fraction = 0;

  void validate() const;
  std::string to_string() const;
  bool operator==(const Parameters&) const = default;
};

/// The fraction of multiply-accumulates to remove, in [0, 1).
struct RAREFY_API Macs {
  double fraction = 0;

  void validate() const;
  std::string to_string() const;
  bool operator==(const Macs&) const = default;
};

using Target = std::variant<Channels, Parameters, Macs>;

/// The target after `step` of `steps` equal steps: fraction * step / steps. Throws c10::ValueError for a step outside
/// [1, steps].
RAREFY_API Target at_step(const Target& target, int64_t step, int64_t steps);

/// Which units compete for being kept.
enum class UnitScope {
  global,      // all together
  local,       // those of a group; every group loses the same fraction
  isomorphic,  // those of groups of equal structure; every such class loses the same fraction (arXiv:2407.04616)
};

/// "global", "local" or "isomorphic". Throws c10::ValueError for anything else.
RAREFY_API UnitScope parse_unit_scope(const std::string& name);
RAREFY_API const char* name(UnitScope scope);

/// Sizes before the first step, which fractions refer to.
struct RAREFY_API Baseline {
  Counts counts;
  std::vector<std::pair<std::string, int64_t>> units;  // of each group, by name
};

RAREFY_API Baseline make_baseline(const Structure& structure, const Shapes& shapes);

struct RAREFY_API ChoiceOptions {
  Target target = Channels{0.5};
  UnitScope scope = UnitScope::global;
  /// Widths that are left become multiples of it: the slices that a group's units fill in each dimension. A group whose
  /// units are 64 wide in every dimension therefore meets 8 with any number of units.
  int64_t round_to = 1;
  int64_t min_width = 1;  // units that every group keeps at least; a group that has fewer is left alone
  /// Largest fraction removed, in [0, 1], of groups that a pattern names by a tensor or module that produces or scales
  /// their channels (see select_parameters() for patterns); the smallest counts.
  std::vector<std::pair<std::string, double>> limits = {};
  bool strict = false;

  /// Throws c10::ValueError when a field is out of range.
  void validate() const;
};

/// What becomes of a group.
struct RAREFY_API GroupOutcome {
  std::string name;
  int64_t units = 0;
  int64_t removed = 0;
  std::string reason;  // why none, or why no more; empty when nothing holds the group back

  std::string to_string() const;
  bool operator==(const GroupOutcome&) const = default;
};

struct RAREFY_API Choice {
  Removal removal;
  std::vector<GroupOutcome> groups;
  std::optional<Target> target;  // unset when widths were given
  Counts before;                 // the baseline
  Counts after;

  /// Fractions of the baseline that are gone.
  double channels_removed() const;
  double parameters_removed() const;
  double macs_removed() const;
  /// Of these the one that the target is about; of channels when widths were given.
  double achieved() const;
  /// Asked against achieved, and a line per group.
  std::string to_string() const;
  std::string to_html() const;
};

/// Chooses the units to remove so that the target is met as closely as whole units (of round_to) allow.
///
/// Units leave in one order: of the lowest score first within what competes, of equal scores that of the earlier group,
/// then that of the lower index. Under `local` and `isomorphic` the orders of the groups or classes are merged so that
/// all have lost the same fraction at each point. How many leave is found by bisection over that order with exact
/// counts. For Channels each group (class) is given its own fraction, rounded half to even, and what a limit withholds
/// from one is not taken from others; under `global` and for the other targets it is.
///
///   shapes    of all parameters of the model
///   scores    from importance(): one per group
///   baseline  of the first of several steps; unset: what the structure is now. Groups are found in it by name, of
///             equal names by order; one that is not in it had the units that it has
/// Throws c10::ValueError for an option out of range, for a limit that names nothing in the structure, for scores that
/// do not fit, and, when `strict` is set, when one more unit (or step of round_to) would have come nearer to the target
/// but was withheld; the message then names groups and what is pinned, with reasons.
RAREFY_API Choice choose(const Structure& structure, const Shapes& shapes, const std::vector<GroupScore>& scores,
                         const ChoiceOptions& options, const std::optional<Baseline>& baseline = std::nullopt);

/// Chooses by number: group g keeps its widths[g] units of the highest score. Throws c10::ValueError when a width is
/// not in [1, units], and for a group without scores that is to lose units.
RAREFY_API Choice choose_widths(const Structure& structure, const Shapes& shapes, const std::vector<GroupScore>& scores,
                                const std::vector<int64_t>& widths,
                                const std::optional<Baseline>& baseline = std::nullopt);

}  // namespace rarefy::pruning
