#pragma once

#include <rarefy/export.h>
#include <rarefy/graph/graph.h>

#include <cstdint>
#include <memory>
#include <string>
#include <utility>
#include <vector>

namespace rarefy::pruning {

/// What a dimension of a parameter is to a group.
enum class Role {
  output,  // its slices produce the channel: rows of a weight, biases
  input,   // its slices consume the channel: columns of a weight
  affine,  // one value per channel on the way: scale, shift and statistics of a normalization
};

RAREFY_API const char* name(Role role);

/// A dimension of a parameter or buffer that shrinks when units of a group are removed.
struct RAREFY_API Member {
  std::string tensor;  // "layer1.0.conv1.weight"
  int64_t value = -1;  // of the graph
  int64_t dim = 0;
  Role role = Role::output;
  std::vector<int32_t> unit_of_index;  // for each index along dim: the unit of this group, -1 for another's
};

/// Channels that can only be removed together, coupled by what the model computes: a channel of a residual stream with
/// everything that writes or reads it, a head with its query, key and value rows, a pair of gate and value.
/// A unit is what is removed as one; all units of a group occur in the same dimensions of the same tensors.
struct RAREFY_API Group {
  std::string name;  // of the first member that produces it
  int64_t units = 0;
  std::vector<Member> members;
};

/// Slices that stay, and why.
struct RAREFY_API Pinned {
  std::string tensor;
  int64_t dim = 0;
  int64_t size = 0;    // how many of the dimension's slices stay for this reason
  int64_t node = -1;   // the operator that pins them; -1 when none does
  std::string reason;  // "aten::sort (head, model.py:12) is not known to ..."
};

/// How the multiply-accumulates of one operator depend on what is removed:
/// factor * product over axes of the slices that are left.
struct RAREFY_API Cost {
  int64_t node = -1;
  double factor = 1;
  /// For each axis and each index along it: group and unit, {-1, -1} for an index that always stays.
  std::vector<std::vector<std::pair<int32_t, int32_t>>> axes;
};

/// What must keep its shape, and why.
struct RAREFY_API Pins {
  std::vector<std::pair<int64_t, std::string>> nodes;        // operators: what they read and write
  std::vector<std::pair<std::string, std::string>> tensors;  // parameters and buffers by name
};

struct Provenance;

struct RAREFY_API Structure {
  std::vector<Group> groups;
  std::vector<Pinned> pinned;
  std::vector<Cost> costs;
  std::shared_ptr<const Provenance> provenance;  // of every tensor of the recording; for the functions of this library

  std::string to_string() const;
};

/// Reads the groups off a recording (graph::record).
RAREFY_API Structure find_structure(const graph::Graph& graph, const Pins& pins = {});

/// What is removed: for each group, ascending units.
using Removal = std::vector<std::vector<int32_t>>;

/// Slices of one dimension of one tensor that stay, ascending.
struct RAREFY_API Cut {
  std::string tensor;
  int64_t dim = 0;
  std::vector<int64_t> kept;
};

/// The cuts that a removal makes: one per tensor and dimension that loses slices.
RAREFY_API std::vector<Cut> cuts(const Structure& structure, const Removal& removal);

}  // namespace rarefy::pruning
