#include "pruning/ranking.h"

#include <c10/util/Exception.h>
#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <map>
#include <numeric>

#include "pruning/patterns.h"
#include "pruning/slice_sums.h"

namespace rarefy::pruning {
namespace {

/// Slices per unit along each dimension, if all units of a group have as many; 1 otherwise.
int64_t slices_per_unit(const Member& member, int64_t units) {
  std::vector<int64_t> slices(static_cast<size_t>(units), 0);
  for (const auto unit : member.unit_of_index) {
    if (unit >= 0) {
      ++slices[static_cast<size_t>(unit)];
    }
  }
  const bool equal = std::all_of(slices.begin(), slices.end(), [&](int64_t n) { return n == slices.front(); });
  return units > 0 && equal && slices.front() > 0 ? slices.front() : 1;
}

/// The step in units that makes the slices of every dimension multiples of round_to.
int64_t unit_step(const Group& group, int64_t round_to) {
  int64_t step = 1;
  for (const auto& member : group.members) {
    step = std::lcm(step, round_to / std::gcd(round_to, slices_per_unit(member, group.units)));
  }
  return group.members.empty() ? round_to : step;
}

bool names(const std::string& pattern, const Group& group, bool producers_only) {
  return std::any_of(group.members.begin(), group.members.end(), [&](const Member& member) {
    return (!producers_only || member.role != Role::input) && matches_parameter(pattern, member.tensor);
  });
}

void check_limits(const Structure& structure, const ChoiceOptions& options) {
  for (const auto& [pattern, fraction] : options.limits) {
    const bool known =
        std::any_of(structure.groups.begin(), structure.groups.end(),
                    [&, p = pattern](const Group& group) { return names(p, group, false); }) ||
        std::any_of(structure.pinned.begin(), structure.pinned.end(),
                    [&, p = pattern](const Pinned& pinned) { return matches_parameter(p, pinned.tensor); });
    TORCH_CHECK_VALUE(known, "[choose] every name in limits must be that of a parameter or module of the model, got '",
                      pattern, "'");
  }
}

void set_bound(RankedGroup& ranked, const Group& group, const ChoiceOptions& options) {
  ranked.step = unit_step(group, options.round_to);
  ranked.most = std::max<int64_t>(ranked.units - options.min_width, 0);
  ranked.bound = fmt::format("min_width keeps {} of {} units", std::min(options.min_width, ranked.units), ranked.units);
  for (const auto& [pattern, fraction] : options.limits) {
    if (!names(pattern, group, true)) {
      continue;
    }
    // 0.29 * 100 is less than 29 in binary; a limit of 0.29 allows 29 of 100.
    const auto allowed = static_cast<int64_t>(std::floor(fraction * static_cast<double>(ranked.original) + 1e-9));
    const auto now = std::max<int64_t>(allowed - (ranked.original - ranked.units), 0);
    if (now < ranked.most) {
      ranked.most = now;
      ranked.bound = fmt::format("limit {} of '{}' allows {} of {} units", fraction, pattern, allowed, ranked.original);
    }
  }
  if (ranked.step > 1 && ranked.most > 0 && ranked.rounded(ranked.most) == 0) {
    ranked.most = 0;
    ranked.bound = fmt::format("round_to {} needs a multiple of {} units below {}, and {}", options.round_to,
                               ranked.step, ranked.units, ranked.bound);
  }
}

}  // namespace

int64_t RankedGroup::rounded(int64_t count) const {
  count = std::clamp<int64_t>(count, 0, most);
  if (step == 1 || count == 0) {
    return count;
  }
  const int64_t left = units - count;
  const int64_t below = left / step * step;
  const int64_t above = below == left ? left : std::min(below + step, units);
  const bool below_allowed = below > 0 && below >= units - most;
  return units - (below_allowed && left - below < above - left ? below : above);
}

std::vector<RankedGroup> rank(const Structure& structure, const std::vector<GroupScore>& scores,
                              const ChoiceOptions& options, const std::vector<int64_t>& original) {
  TORCH_CHECK_VALUE(scores.size() == structure.groups.size(), "[choose] scores must be given for each of ",
                    structure.groups.size(), " groups, got ", scores.size());
  check_limits(structure, options);
  std::vector<RankedGroup> out;
  for (size_t g = 0; g < structure.groups.size(); ++g) {
    const auto& group = structure.groups[g];
    auto& ranked = out.emplace_back();
    ranked.units = group.units;
    ranked.original = original[g];
    if (!scores[g].values.defined()) {
      ranked.bound = scores[g].reason.empty() ? "no scores" : scores[g].reason;
      continue;
    }
    const auto& given = scores[g].values;
    TORCH_CHECK_VALUE(given.dim() == 1 && given.size(0) == group.units, "[choose] the scores of group ", group.name,
                      " must be 1-D with ", group.units, " values, one per unit, got sizes ", given.sizes());
    const auto values = to_doubles(given);
    TORCH_CHECK_VALUE(std::all_of(values.begin(), values.end(), [](double v) { return std::isfinite(v); }),
                      "[choose] scores must be finite, got NaN or infinity in group ", group.name);
    ranked.order.resize(values.size());
    std::iota(ranked.order.begin(), ranked.order.end(), 0);
    const auto score = [&](int32_t unit) { return values[static_cast<size_t>(unit)]; };
    std::stable_sort(ranked.order.begin(), ranked.order.end(),
                     [&](int32_t a, int32_t b) { return score(a) < score(b); });
    std::transform(ranked.order.begin(), ranked.order.end(), std::back_inserter(ranked.scores), score);
    set_bound(ranked, group, options);
  }
  return out;
}

std::vector<std::vector<size_t>> competitors(const Structure& structure, const Shapes& shapes, UnitScope scope) {
  std::vector<std::vector<size_t>> pools;
  std::map<std::vector<std::string>, size_t> classes;
  for (size_t g = 0; g < structure.groups.size(); ++g) {
    std::vector<std::string> signature;
    if (scope == UnitScope::local) {
      signature.push_back(std::to_string(g));
    } else if (scope == UnitScope::isomorphic) {
      const auto& group = structure.groups[g];
      for (const auto& member : group.members) {
        const auto shape = shapes.find(member.tensor);
        signature.push_back(fmt::format("{} {} of {}, {} each, {}", name(member.role), member.dim,
                                        shape == shapes.end() ? -1 : static_cast<int64_t>(shape->second.size()),
                                        slices_per_unit(member, group.units),
                                        member.tensor.substr(member.tensor.rfind('.') + 1)));
      }
      std::sort(signature.begin(), signature.end());
    }
    const auto [found, is_new] = classes.emplace(std::move(signature), pools.size());
    if (is_new) {
      pools.emplace_back();
    }
    pools[found->second].push_back(g);
  }
  return pools;
}

std::vector<size_t> sequence(const std::vector<RankedGroup>& groups, const std::vector<size_t>& chosen) {
  std::vector<std::pair<double, size_t>> units;
  for (const auto g : chosen) {
    for (size_t i = 0; i < static_cast<size_t>(groups[g].most); ++i) {
      units.emplace_back(groups[g].scores[i], g);
    }
  }
  std::stable_sort(units.begin(), units.end(), [](const auto& a, const auto& b) { return a.first < b.first; });
  std::vector<size_t> out;
  std::transform(units.begin(), units.end(), std::back_inserter(out), [](const auto& unit) { return unit.second; });
  return out;
}

std::vector<size_t> merged(const std::vector<RankedGroup>& groups, const std::vector<std::vector<size_t>>& pools) {
  std::vector<std::pair<double, size_t>> units;  // the fraction of the pool that is gone halfway through the unit
  for (const auto& pool : pools) {
    int64_t original = 0, gone = 0;
    for (const auto g : pool) {
      original += groups[g].original;
      gone += groups[g].original - groups[g].units;
    }
    for (const auto g : sequence(groups, pool)) {
      units.emplace_back((static_cast<double>(gone++) + 0.5) / static_cast<double>(original), g);
    }
  }
  std::stable_sort(units.begin(), units.end(), [](const auto& a, const auto& b) { return a.first < b.first; });
  std::vector<size_t> out;
  std::transform(units.begin(), units.end(), std::back_inserter(out), [](const auto& unit) { return unit.second; });
  return out;
}

}  // namespace rarefy::pruning
