#include "removed.h"

#include "propagation.h"

namespace rarefy::pruning {

using graph::Graph;

RemovedView::RemovedView(const Graph& graph, const Structure& structure, const Removal& removal)
    : graph_(graph),
      provenance_(structure.provenance.get()),
      places_(graph.values.size()),
      known_(graph.values.size(), 0) {
  gone_.assign(provenance_->labels.size(), 0);
  std::vector<std::vector<char>> units(removal.size());
  for (size_t g = 0; g < removal.size(); ++g) {
    units[g].assign(structure.groups[g].units, 0);
    for (auto unit : removal[g]) {
      units[g][unit] = 1;
    }
    if (removal[g].empty()) {
      continue;
    }
    // The labels of a unit, from any member.
    for (const auto& member : structure.groups[g].members) {
      for (const auto& leaf : provenance_->leaves) {
        if (leaf.value != member.value || leaf.dim != member.dim) {
          continue;
        }
        for (int64_t i = 0; i < leaf.size; ++i) {
          const auto unit = member.unit_of_index[i];
          if (unit >= 0 && units[g][unit]) {
            gone_[provenance_->labels.find(leaf.first + static_cast<int32_t>(i))] = 1;
          }
        }
      }
      break;  // all members of a group hold all of its units
    }
  }
}

RemovedView::RemovedView(const Graph& graph)
    : graph_(graph), places_(graph.values.size()), known_(graph.values.size(), 1) {}

RemovedView::~RemovedView() = default;

const std::vector<RemovedPlaces>& RemovedView::of(int64_t value) const {
  auto& out = places_[value];
  if (known_[value]) {
    return out;
  }
  known_[value] = 1;
  std::vector<std::vector<char>> marks(graph_.values[value].sizes.size());
  for (const auto& field : provenance_->fields[value]) {
    const auto dims = field.dims();
    if (dims.size() != 1) {
      continue;  // pinned altogether: what is left to remove is rectangular
    }
    auto& mine = marks[dims[0]];
    const auto flat = field.labels.contiguous();
    const auto* data = flat.const_data_ptr<int32_t>();
    mine.resize(flat.numel(), 0);
    for (int64_t i = 0; i < flat.numel(); ++i) {
      mine[i] |= gone_[provenance_->labels.find(data[i])];
    }
  }
  for (size_t d = 0; d < marks.size(); ++d) {
    RemovedPlaces places;
    places.dim = static_cast<int64_t>(d);
    for (size_t i = 0; i < marks[d].size(); ++i) {
      (marks[d][i] ? places.removed : places.kept).push_back(static_cast<int64_t>(i));
    }
    if (!places.removed.empty()) {
      out.push_back(std::move(places));
    }
  }
  return out;
}

const RemovedPlaces* RemovedView::along(int64_t value, int64_t dim) const {
  for (const auto& places : of(value)) {
    if (places.dim == dim) {
      return &places;
    }
  }
  return nullptr;
}

bool RemovedView::depends_on_input(int64_t value) const { return !provenance_ || provenance_->depends_on_input[value]; }

std::vector<int64_t> RemovedView::sizes(int64_t value) const {
  auto out = graph_.values[value].sizes;
  for (const auto& places : of(value)) {
    out[places.dim] = static_cast<int64_t>(places.kept.size());
  }
  return out;
}

}  // namespace rarefy::pruning
