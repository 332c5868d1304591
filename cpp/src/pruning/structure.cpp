#include <c10/util/Exception.h>
#include <rarefy/pruning/structure.h>

#include <algorithm>
#include <map>
#include <unordered_map>

#include "propagation.h"

namespace rarefy::pruning {

namespace {

/// Where a label went: group and unit, or {-1, -1}.
using Place = std::pair<int32_t, int32_t>;

/// Units that occur equally often in the same dimensions make a group.
std::vector<Place> make_groups(const graph::Graph& graph, const Provenance& provenance, Structure& out) {
  const auto& labels = provenance.labels;
  const int64_t n = labels.size();
  std::vector<uint64_t> signature(n, 0);
  std::vector<int32_t> count(n, 0), touched;
  for (size_t k = 0; k < provenance.leaves.size(); ++k) {
    const auto& leaf = provenance.leaves[k];
    touched.clear();
    for (int64_t i = 0; i < leaf.size; ++i) {
      const auto root = labels.find(leaf.first + static_cast<int32_t>(i));
      if (labels.pinned(root)) {
        continue;
      }
      if (count[root]++ == 0) {
        touched.push_back(root);
      }
    }
    for (auto root : touched) {
      uint64_t mixed = signature[root] ^ (k * 0x9E3779B97F4A7C15ULL + static_cast<uint64_t>(count[root]));
      mixed = (mixed ^ (mixed >> 31)) * 0xBF58476D1CE4E5B9ULL;
      signature[root] = mixed ^ (mixed >> 27);
      count[root] = 0;
    }
  }
  std::vector<Place> places(n, {-1, -1});
  std::unordered_map<uint64_t, int32_t> group_of;
  for (const auto& leaf : provenance.leaves) {
    for (int64_t i = 0; i < leaf.size; ++i) {
      const auto root = labels.find(leaf.first + static_cast<int32_t>(i));
      if (labels.pinned(root) || places[root].first >= 0) {
        continue;
      }
      const auto [found, inserted] = group_of.try_emplace(signature[root], static_cast<int32_t>(out.groups.size()));
      if (inserted) {
        out.groups.emplace_back();
      }
      places[root] = {found->second, static_cast<int32_t>(out.groups[found->second].units++)};
    }
  }
  for (const auto& leaf : provenance.leaves) {
    std::vector<Place> here(leaf.size);
    std::map<int32_t, Member> members;  // by group
    for (int64_t i = 0; i < leaf.size; ++i) {
      here[i] = places[labels.find(leaf.first + static_cast<int32_t>(i))];
      if (here[i].first >= 0) {
        members.try_emplace(here[i].first);
      }
    }
    for (auto& [group, member] : members) {
      member.tensor = graph.values[leaf.value].name;
      member.value = leaf.value;
      member.dim = leaf.dim;
      const auto role = provenance.roles[leaf.value][leaf.dim];
      member.role = role < 0 ? Role::affine : static_cast<Role>(role);
      member.unit_of_index.resize(leaf.size);
      for (int64_t i = 0; i < leaf.size; ++i) {
        member.unit_of_index[i] = here[i].first == group ? here[i].second : -1;
      }
      out.groups[group].members.push_back(std::move(member));
    }
  }
  for (auto& group : out.groups) {
    const Member* best = &group.members.front();
    for (const auto& member : group.members) {
      if (member.role == Role::output && graph.values[member.value].sizes.size() > 1) {
        best = &member;
        break;
      }
    }
    group.name = best->tensor;
  }
  return places;
}

/// Slices that nothing of the example run depends on, such as more positions than the inputs have, or a buffer that is not
/// used: other inputs may need them.
void pin_unused(Provenance& provenance) {
  auto& labels = provenance.labels;
  std::vector<char> used(labels.size(), 0);
  for (size_t value = 0; value < provenance.fields.size(); ++value) {
    if (!provenance.depends_on_input[value]) {
      continue;
    }
    for (const auto& field : provenance.fields[value]) {
      const auto flat = field.labels.contiguous();
      const auto* data = flat.const_data_ptr<int32_t>();
      for (int64_t i = 0; i < flat.numel(); ++i) {
        used[labels.find(data[i])] = 1;
      }
    }
  }
  int32_t reason = -1;
  for (const auto& leaf : provenance.leaves) {
    for (int64_t i = 0; i < leaf.size; ++i) {
      const auto root = labels.find(leaf.first + static_cast<int32_t>(i));
      if (!used[root] && !labels.pinned(root)) {
        if (reason < 0) {
          reason = labels.add_reason(-1, "the example inputs do not reach them, and others may");
        }
        labels.pin(root, reason);
      }
    }
  }
}

void find_pinned(const graph::Graph& graph, const Provenance& provenance, Structure& out) {
  const auto& labels = provenance.labels;
  for (const auto& leaf : provenance.leaves) {
    std::map<int32_t, int64_t> by_reason;
    for (int64_t i = 0; i < leaf.size; ++i) {
      const auto why = labels.reason(leaf.first + static_cast<int32_t>(i));
      if (why >= 0) {
        ++by_reason[why];
      }
    }
    for (const auto& [why, size] : by_reason) {
      const auto& reason = labels.reasons[why];
      out.pinned.push_back({graph.values[leaf.value].name, leaf.dim, size, reason.node, reason.text});
    }
  }
}

}  // namespace

Structure find_structure(const graph::Graph& graph, const Pins& pins) {
  auto provenance = std::make_shared<Provenance>();
  Propagator(graph, *provenance).run(pins);
  pin_unused(*provenance);
  Structure out;
  const auto places = make_groups(graph, *provenance, out);
  find_pinned(graph, *provenance, out);
  for (const auto& cost : provenance->costs) {
    Cost mine{cost.node, cost.factor, {}};
    for (const auto& axis : cost.axes) {
      const auto flat = axis.contiguous();
      const auto* data = flat.const_data_ptr<int32_t>();
      std::vector<Place> axis_places(flat.numel());
      bool any = false;
      for (int64_t i = 0; i < flat.numel(); ++i) {
        axis_places[i] = places[provenance->labels.find(data[i])];
        any = any || axis_places[i].first >= 0;
      }
      if (any) {
        mine.axes.push_back(std::move(axis_places));
      } else {
        mine.factor *= static_cast<double>(flat.numel());
      }
    }
    out.costs.push_back(std::move(mine));
  }
  out.provenance = std::move(provenance);
  return out;
}

std::vector<Cut> cuts(const Structure& structure, const Removal& removal) {
  TORCH_CHECK_VALUE(removal.size() == structure.groups.size(), "[cuts] removal must have one list of units per group (",
                    structure.groups.size(), "), got ", removal.size());
  std::map<std::pair<std::string, int64_t>, std::vector<char>> removed;
  for (size_t g = 0; g < removal.size(); ++g) {
    const auto& group = structure.groups[g];
    if (removal[g].empty()) {
      continue;
    }
    std::vector<char> gone(group.units, 0);
    for (auto unit : removal[g]) {
      TORCH_CHECK_INDEX(unit >= 0 && unit < group.units, "[cuts] unit must be in [0, ", group.units, ") of group '",
                        group.name, "', got ", unit);
      gone[unit] = 1;
    }
    for (const auto& member : group.members) {
      auto& marks = removed[{member.tensor, member.dim}];
      marks.resize(member.unit_of_index.size(), 0);
      for (size_t i = 0; i < marks.size(); ++i) {
        marks[i] |= member.unit_of_index[i] >= 0 && gone[member.unit_of_index[i]];
      }
    }
  }
  std::vector<Cut> out;
  for (const auto& [place, marks] : removed) {
    Cut cut{place.first, place.second, {}};
    for (size_t i = 0; i < marks.size(); ++i) {
      if (!marks[i]) {
        cut.kept.push_back(static_cast<int64_t>(i));
      }
    }
    if (cut.kept.size() < marks.size()) {
      out.push_back(std::move(cut));
    }
  }
  return out;
}

}  // namespace rarefy::pruning
