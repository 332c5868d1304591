#include <c10/util/Exception.h>
#include <rarefy/pruning/counts.h>

#include <algorithm>
#include <unordered_map>

#include "pruning/counter.h"

namespace rarefy::pruning {
namespace {

using Owner = std::pair<int32_t, int32_t>;  // group and unit
constexpr Owner kStays{-1, -1};

}  // namespace

int64_t Counter::Axis::left(const std::vector<int64_t>& removed) const {
  int64_t out = size;
  for (const auto& part : parts) {
    const auto count = removed[part.group];
    out -= part.each >= 0 ? part.each * count : part.lost[static_cast<size_t>(count)];
  }
  return out;
}

Counter::Axis Counter::make_axis(const Structure& structure, const std::vector<Owner>& of_index,
                                 const std::vector<std::vector<int32_t>>& order, const std::string& what) const {
  Axis axis;
  axis.size = static_cast<int64_t>(of_index.size());
  std::vector<std::pair<int32_t, std::vector<int64_t>>> found;  // of each group on the axis: indices per unit
  for (const auto& [group, unit] : of_index) {
    if (group < 0) {
      continue;
    }
    TORCH_CHECK_INDEX(group < static_cast<int64_t>(structure.groups.size()), "[count] groups must be less than ",
                      structure.groups.size(), ", got ", group, " in ", what);
    const auto units = structure.groups[static_cast<size_t>(group)].units;
    TORCH_CHECK_INDEX(unit >= 0 && unit < units, "[count] units of group ",
                      structure.groups[static_cast<size_t>(group)].name, " must be in [0, ", units, "), got ", unit,
                      " in ", what);
    auto at = std::find_if(found.begin(), found.end(), [&](const auto& entry) { return entry.first == group; });
    if (at == found.end()) {
      at = found.insert(found.end(), {group, std::vector<int64_t>(static_cast<size_t>(units), 0)});
    }
    ++at->second[static_cast<size_t>(unit)];
  }
  for (const auto& [group, indices] : found) {
    auto& part = axis.parts.emplace_back();
    part.group = static_cast<size_t>(group);
    if (std::all_of(indices.begin(), indices.end(), [&](int64_t n) { return n == indices.front(); })) {
      part.each = indices.front();
      continue;
    }
    part.lost.push_back(0);
    for (const auto unit : order[part.group]) {
      part.lost.push_back(part.lost.back() + indices[static_cast<size_t>(unit)]);
    }
  }
  return axis;
}

Counter::Counter(const Structure& structure, const Shapes& shapes, const std::vector<std::vector<int32_t>>& order) {
  std::unordered_map<std::string, std::vector<std::vector<Owner>>> owners;  // of a tensor's dimensions
  for (size_t g = 0; g < structure.groups.size(); ++g) {
    const auto& group = structure.groups[g];
    units_ += group.units;
    for (const auto& member : group.members) {
      const auto shape = shapes.find(member.tensor);
      if (shape == shapes.end()) {
        continue;  // a buffer
      }
      TORCH_CHECK_VALUE(
          member.dim >= 0 && member.dim < static_cast<int64_t>(shape->second.size()) &&
              shape->second[static_cast<size_t>(member.dim)] == static_cast<int64_t>(member.unit_of_index.size()),
          "[count] ", member.tensor, " must have ", member.unit_of_index.size(), " slices along dimension ", member.dim,
          " as in the structure, got sizes ", c10::IntArrayRef(shape->second));
      auto& dims = owners[member.tensor];
      dims.resize(shape->second.size());
      auto& of_index = dims[static_cast<size_t>(member.dim)];
      of_index.resize(member.unit_of_index.size(), kStays);
      for (size_t i = 0; i < of_index.size(); ++i) {
        const Owner owner{static_cast<int32_t>(g), member.unit_of_index[i]};
        if (owner.second < 0) {
          continue;
        }
        TORCH_CHECK_VALUE(of_index[i] == kStays || of_index[i] == owner, "[count] index ", i, " of dimension ",
                          member.dim, " of ", member.tensor, " must belong to one unit, got ", of_index[i].second,
                          " of group ", of_index[i].first, " and ", owner.second, " of group ", owner.first);
        of_index[i] = owner;
      }
    }
  }
  for (const auto& [name, shape] : shapes) {
    const auto found = owners.find(name);
    if (found == owners.end()) {
      int64_t elements = 1;
      for (const auto size : shape) {
        elements *= size;
      }
      fixed_parameters_ += elements;
      continue;
    }
    auto& tensor = tensors_.emplace_back();
    for (size_t dim = 0; dim < shape.size(); ++dim) {
      auto& axis = tensor.axes.emplace_back(make_axis(structure, found->second[dim], order, name));
      axis.size = shape[dim];
    }
  }
  for (const auto& cost : structure.costs) {
    auto& product = costs_.emplace_back();
    product.factor = cost.factor;
    for (const auto& axis : cost.axes) {
      product.axes.push_back(make_axis(structure, axis, order, c10::str("the cost of node ", cost.node)));
    }
  }
}

int64_t Counter::parameters(const std::vector<int64_t>& removed) const {
  int64_t out = fixed_parameters_;
  for (const auto& tensor : tensors_) {
    int64_t elements = 1;
    for (const auto& axis : tensor.axes) {
      elements *= axis.left(removed);
    }
    out += elements;
  }
  return out;
}

double Counter::macs(const std::vector<int64_t>& removed) const {
  double out = 0;
  for (const auto& cost : costs_) {
    double macs = cost.factor;
    for (const auto& axis : cost.axes) {
      macs *= static_cast<double>(axis.left(removed));
    }
    out += macs;
  }
  return out;
}

int64_t Counter::channels(const std::vector<int64_t>& removed) const {
  int64_t out = units_;
  for (const auto count : removed) {
    out -= count;
  }
  return out;
}

Counts Counter::all(const std::vector<int64_t>& removed) const {
  return {channels(removed), parameters(removed), macs(removed)};
}

std::vector<int64_t> check_removal(const Structure& structure, const Removal& removal) {
  TORCH_CHECK_VALUE(removal.size() == structure.groups.size(), "[count] a removal must have one list per group, ",
                    structure.groups.size(), ", got ", removal.size());
  std::vector<int64_t> counts;
  for (size_t g = 0; g < removal.size(); ++g) {
    int32_t last = -1;
    for (const auto unit : removal[g]) {
      TORCH_CHECK_INDEX(unit >= 0 && unit < structure.groups[g].units, "[count] units of group ",
                        structure.groups[g].name, " must be in [0, ", structure.groups[g].units, "), got ", unit);
      TORCH_CHECK_VALUE(unit > last, "[count] removed units must be ascending, got ", unit, " after ", last,
                        " in group ", structure.groups[g].name);
      last = unit;
    }
    counts.push_back(static_cast<int64_t>(removal[g].size()));
  }
  return counts;
}

Shapes parameter_shapes(const graph::Graph& graph) {
  Shapes shapes;
  for (const auto& value : graph.values) {
    if (value.origin == graph::Origin::parameter) {
      shapes.emplace(value.name, value.sizes);
    }
  }
  return shapes;
}

int64_t parameter_count(const Structure& structure, const Shapes& shapes, const Removal& removal) {
  return count(structure, shapes, removal).parameters;
}

double mac_count(const Structure& structure, const Removal& removal) {
  const auto removed = check_removal(structure, removal);
  return Counter(structure, {}, removal).macs(removed);
}

Counts count(const Structure& structure, const Shapes& shapes, const Removal& removal) {
  const auto given = removal.empty() ? Removal(structure.groups.size()) : removal;
  const auto removed = check_removal(structure, given);
  return Counter(structure, shapes, given).all(removed);
}

}  // namespace rarefy::pruning
