#include <c10/util/Exception.h>
#include <fmt/format.h>
#include <rarefy/pruning/choice.h>
#include <rarefy/pruning/structure_text.h>

#include <algorithm>
#include <cmath>
#include <functional>
#include <map>
#include <numeric>

#include "pruning/counter.h"
#include "pruning/ranking.h"

namespace rarefy::pruning {
namespace {

using Amounts = std::vector<int64_t>;  // units of each group that leave

void check_fraction(const char* function, const char* what, double fraction) {
  TORCH_CHECK_VALUE(fraction >= 0.0 && fraction < 1.0, "[", function, "] the fraction of ", what,
                    " removed must be in [0, 1), got ", fraction);  // false for NaN
}

double fraction_of(const Target& target) {
  return std::visit([](const auto& chosen) { return chosen.fraction; }, target);
}

double removed_fraction(double before, double after) { return before == 0.0 ? 0.0 : 1.0 - after / before; }

/// The amounts when the first `length` units of a sequence leave and every group is rounded.
Amounts amounts_at(const std::vector<RankedGroup>& groups, const std::vector<size_t>& sequence, size_t length) {
  Amounts amounts(groups.size(), 0);
  for (size_t i = 0; i < length; ++i) {
    ++amounts[sequence[i]];
  }
  return amounts;
}

Amounts rounded(const std::vector<RankedGroup>& groups, Amounts amounts) {
  for (size_t g = 0; g < groups.size(); ++g) {
    amounts[g] = groups[g].rounded(amounts[g]);
  }
  return amounts;
}

/// How much of what the target is about is gone, out of what the structure has now.
using Measure = std::function<double(const Amounts&)>;

/// The shortest start of a sequence whose removal comes nearest to `wanted`. The measure does not fall along it.
size_t nearest(const std::vector<RankedGroup>& groups, const std::vector<size_t>& sequence, const Measure& measure,
               double wanted) {
  const auto at = [&](size_t length) { return measure(rounded(groups, amounts_at(groups, sequence, length))); };
  // The first length whose measure is at least (or above) a bound; one past the end when there is none.
  const auto first = [&](double bound, bool above) {
    size_t low = 0, high = sequence.size() + 1;
    while (low < high) {
      const size_t middle = (low + high) / 2;
      if (middle > sequence.size()) {
        high = middle;
        break;
      }
      const double value = at(middle);
      if (above ? value > bound : value >= bound) {
        high = middle;
      } else {
        low = middle + 1;
      }
    }
    return low;
  };
  const size_t beyond = first(wanted, true);
  if (beyond == 0) {
    return 0;
  }
  const double below = at(beyond - 1);
  if (beyond <= sequence.size() && at(beyond) - wanted < wanted - below) {
    return beyond;
  }
  return first(below, false);
}

struct Search {
  Amounts asked;  // before rounding
  Amounts found;
  bool met = true;  // as closely as one unit of any group allows
};

/// The most that one more or one less unit (step of round_to) of any group changes.
double one_unit(const std::vector<RankedGroup>& groups, const std::vector<size_t>& pool, const Measure& measure,
                const Amounts& amounts) {
  const double here = measure(amounts);
  double most = 0;
  for (const auto g : pool) {
    for (const int64_t direction : {-1, 1}) {
      auto other = amounts;
      do {
        other[g] += direction;
      } while (other[g] > 0 && other[g] < groups[g].most && groups[g].rounded(other[g]) == amounts[g]);
      other[g] = groups[g].rounded(other[g]);
      most = std::max(most, std::abs(measure(other) - here));
    }
  }
  return most;
}

/// True when no whole unit more or less would come nearer, were there no bounds.
bool is_met(const std::vector<RankedGroup>& groups, const std::vector<size_t>& pool, const Measure& measure,
            const Amounts& amounts, double wanted) {
  const double tolerance = one_unit(groups, pool, measure, amounts) / 2;
  return std::abs(measure(amounts) - wanted) <= tolerance + 1e-9 * std::max(1.0, std::abs(wanted));
}

Search search(const std::vector<RankedGroup>& groups, const std::vector<std::vector<size_t>>& pools,
              const Counter& counter, const Target& target, const Counts& before) {
  const double fraction = fraction_of(target);
  Search result;
  result.met = !groups.empty() || fraction == 0.0;
  if (std::holds_alternative<Channels>(target)) {
    result.asked.assign(groups.size(), 0);
    for (const auto& pool : pools) {
      int64_t original = 0, now = 0;
      for (const auto g : pool) {
        original += groups[g].original;
        now += groups[g].units;
      }
      const double wanted =
          std::nearbyint(fraction * static_cast<double>(original)) - static_cast<double>(original - now);
      const Measure measure = [](const Amounts& amounts) {
        return static_cast<double>(std::accumulate(amounts.begin(), amounts.end(), int64_t{0}));
      };
      const auto units = sequence(groups, pool);
      const auto asked = amounts_at(groups, units, nearest(groups, units, measure, wanted));
      result.met = result.met && is_met(groups, pool, measure, rounded(groups, asked), wanted);
      std::transform(asked.begin(), asked.end(), result.asked.begin(), result.asked.begin(), std::plus<>());
    }
  } else {
    const bool is_macs = std::holds_alternative<Macs>(target);
    const auto left = [&](const Amounts& amounts) {
      return is_macs ? counter.macs(amounts) : static_cast<double>(counter.parameters(amounts));
    };
    const double now = left(Amounts(groups.size(), 0));
    const Measure measure = [&](const Amounts& amounts) { return now - left(amounts); };
    const double all = is_macs ? before.macs : static_cast<double>(before.parameters);
    const double wanted = fraction * all - (all - now);
    const auto units = pools.size() == 1 ? sequence(groups, pools.front()) : merged(groups, pools);
    result.asked = amounts_at(groups, units, nearest(groups, units, measure, wanted));
    std::vector<size_t> every(groups.size());
    std::iota(every.begin(), every.end(), size_t{0});
    result.met = result.met && is_met(groups, every, measure, rounded(groups, result.asked), wanted);
  }
  result.found = rounded(groups, result.asked);
  return result;
}

std::string reason_for(const RankedGroup& group, int64_t asked, int64_t found, double fraction,
                       const ChoiceOptions& options) {
  if (group.most == 0) {
    return group.bound;
  }
  if (found == group.most || (asked == group.most && found > 0 && found < asked)) {
    return group.bound;
  }
  if (found < asked) {
    return fmt::format("round_to {}: {} of {} units round to {}", options.round_to, group.units - asked, group.units,
                       group.units - found);
  }
  if (found > 0 || fraction == 0.0) {
    return "";
  }
  return options.scope == UnitScope::global ? "all units score above those removed from other groups"
                                            : fmt::format("the fraction rounds to none of {} units", group.units);
}

Removal make_removal(const std::vector<RankedGroup>& groups, const Amounts& amounts) {
  Removal removal;
  for (size_t g = 0; g < groups.size(); ++g) {
    auto& units = removal.emplace_back(groups[g].order.begin(), groups[g].order.begin() + amounts[g]);
    std::sort(units.begin(), units.end());
  }
  return removal;
}

std::vector<std::vector<int32_t>> orders(const std::vector<RankedGroup>& groups) {
  std::vector<std::vector<int32_t>> out;
  std::transform(groups.begin(), groups.end(), std::back_inserter(out), [](const auto& group) { return group.order; });
  return out;
}

/// What kept a target from being met, a line each.
std::string obstacles(const Choice& choice, const Structure& structure) {
  std::vector<std::string> lines;
  for (const auto& group : choice.groups) {
    if (!group.reason.empty()) {
      lines.push_back(fmt::format("{}: {}", group.name, group.reason));
    }
  }
  for (const auto& pinned : structure.pinned) {
    lines.push_back(to_string(pinned));
  }
  if (lines.empty()) {
    return ": there are no groups";
  }
  constexpr size_t kMost = 40;
  std::string text;
  for (size_t i = 0; i < std::min(lines.size(), kMost); ++i) {
    text += "\n  " + lines[i];
  }
  return lines.size() > kMost ? text + fmt::format("\n  and {} more", lines.size() - kMost) : text;
}

/// The units that each group of a structure had in the baseline.
Amounts original_units(const Structure& structure, const Baseline& baseline) {
  std::map<std::pair<std::string, size_t>, int64_t> known;  // by name and how many of that name come before
  std::map<std::string, size_t> before, seen;
  for (const auto& [name, units] : baseline.units) {
    known[{name, before[name]++}] = units;
  }
  Amounts out;
  for (const auto& group : structure.groups) {
    const auto found = known.find({group.name, seen[group.name]++});
    out.push_back(found == known.end() ? group.units : std::max(found->second, group.units));
  }
  return out;
}

}  // namespace

void Channels::validate() const { check_fraction("Channels", "channels", fraction); }
void Parameters::validate() const { check_fraction("Parameters", "parameters", fraction); }
void Macs::validate() const { check_fraction("Macs", "macs", fraction); }
std::string Channels::to_string() const { return fmt::format("Channels(fraction={})", fraction); }
std::string Parameters::to_string() const { return fmt::format("Parameters(fraction={})", fraction); }
std::string Macs::to_string() const { return fmt::format("Macs(fraction={})", fraction); }

Target at_step(const Target& target, int64_t step, int64_t steps) {
  TORCH_CHECK_VALUE(step >= 1 && step <= steps, "[at_step] step must be in [1, ", steps, "], got ", step);
  Target out = target;
  std::visit([&](auto& chosen) { chosen.fraction *= static_cast<double>(step) / static_cast<double>(steps); }, out);
  return out;
}

UnitScope parse_unit_scope(const std::string& text) {
  for (const auto scope : {UnitScope::global, UnitScope::local, UnitScope::isomorphic}) {
    if (text == name(scope)) {
      return scope;
    }
  }
  TORCH_CHECK_VALUE(false, "[parse_unit_scope] must be one of global, local, isomorphic, got '", text, "'");
}

const char* name(UnitScope scope) {
  return scope == UnitScope::global ? "global" : scope == UnitScope::local ? "local" : "isomorphic";
}

Baseline make_baseline(const Structure& structure, const Shapes& shapes) {
  Baseline baseline{count(structure, shapes), {}};
  for (const auto& group : structure.groups) {
    baseline.units.emplace_back(group.name, group.units);
  }
  return baseline;
}

void ChoiceOptions::validate() const {
  std::visit([](const auto& chosen) { chosen.validate(); }, target);
  TORCH_CHECK_VALUE(round_to >= 1, "[choose] round_to must be positive, got ", round_to);
  TORCH_CHECK_VALUE(min_width >= 1, "[choose] min_width must be positive, got ", min_width);
  for (const auto& [pattern, fraction] : limits) {
    TORCH_CHECK_VALUE(fraction >= 0.0 && fraction <= 1.0, "[choose] limits must be in [0, 1], got ", fraction, " for '",
                      pattern, "'");
  }
}

double Choice::channels_removed() const {
  return removed_fraction(static_cast<double>(before.channels), static_cast<double>(after.channels));
}

double Choice::parameters_removed() const {
  return removed_fraction(static_cast<double>(before.parameters), static_cast<double>(after.parameters));
}

double Choice::macs_removed() const { return removed_fraction(before.macs, after.macs); }

double Choice::achieved() const {
  return !target.has_value() || std::holds_alternative<Channels>(*target) ? channels_removed()
         : std::holds_alternative<Parameters>(*target)                    ? parameters_removed()
                                                                          : macs_removed();
}

Choice choose(const Structure& structure, const Shapes& shapes, const std::vector<GroupScore>& scores,
              const ChoiceOptions& options, const std::optional<Baseline>& baseline) {
  options.validate();
  const auto base = baseline.has_value() ? *baseline : make_baseline(structure, shapes);
  const auto groups = rank(structure, scores, options, original_units(structure, base));
  const Counter counter(structure, shapes, orders(groups));
  const auto pools = competitors(structure, shapes, options.scope);
  const auto result = search(groups, pools, counter, options.target, base.counts);

  Choice choice{make_removal(groups, result.found), {}, options.target, base.counts, counter.all(result.found)};
  for (size_t g = 0; g < groups.size(); ++g) {
    choice.groups.push_back(
        {structure.groups[g].name, groups[g].units, result.found[g],
         reason_for(groups[g], result.asked[g], result.found[g], fraction_of(options.target), options)});
  }
  if (options.strict && !result.met) {
    TORCH_CHECK_VALUE(false, "[choose] the target must be met as closely as whole units allow when strict is set: ",
                      std::visit([](const auto& chosen) { return chosen.to_string(); }, options.target),
                      " was asked, got ", choice.achieved(), obstacles(choice, structure));
  }
  return choice;
}

Choice choose_widths(const Structure& structure, const Shapes& shapes, const std::vector<GroupScore>& scores,
                     const std::vector<int64_t>& widths, const std::optional<Baseline>& baseline) {
  TORCH_CHECK_VALUE(widths.size() == structure.groups.size(), "[choose_widths] widths must be given for each of ",
                    structure.groups.size(), " groups, got ", widths.size());
  const auto base = baseline.has_value() ? *baseline : make_baseline(structure, shapes);
  const auto groups = rank(structure, scores, {}, original_units(structure, base));
  Amounts amounts;
  for (size_t g = 0; g < groups.size(); ++g) {
    TORCH_CHECK_VALUE(widths[g] >= 1 && widths[g] <= groups[g].units, "[choose_widths] the width of group ",
                      structure.groups[g].name, " must be in [1, ", groups[g].units, "], got ", widths[g]);
    amounts.push_back(groups[g].units - widths[g]);
    TORCH_CHECK_VALUE(amounts.back() == 0 || !groups[g].order.empty(), "[choose_widths] group ",
                      structure.groups[g].name, " must have scores to lose units, got none: ", groups[g].bound);
  }
  const Counter counter(structure, shapes, orders(groups));
  Choice choice{make_removal(groups, amounts), {}, std::nullopt, base.counts, counter.all(amounts)};
  for (size_t g = 0; g < groups.size(); ++g) {
    choice.groups.push_back({structure.groups[g].name, groups[g].units, amounts[g], ""});
  }
  return choice;
}

}  // namespace rarefy::pruning
