#pragma once

#include <rarefy/export.h>
#include <rarefy/pruning/structure.h>

#include <cstdint>
#include <map>
#include <string>
#include <vector>

// Exact sizes of a model after a removal, read off the structure without changing the model.
namespace rarefy::pruning {

/// Sizes of the model's parameters by name, a shared one once.
using Shapes = std::map<std::string, std::vector<int64_t>>;

/// Of the parameters that the recorded run used.
RAREFY_API Shapes parameter_shapes(const graph::Graph& graph);

struct RAREFY_API Counts {
  int64_t channels = 0;    // units of all groups
  int64_t parameters = 0;  // elements of all parameters
  double macs = 0;         // multiply-accumulates of the recorded run; exact up to 2^53

  std::string to_string() const;
  bool operator==(const Counts&) const = default;
};

/// Elements of all parameters once the slices of `removal` are gone. Each slice is counted out once, whatever number of
/// dimensions it lies in. Throws c10::ValueError when a size does not fit the structure, and when an index belongs to
/// units of two groups; c10::IndexError for a unit that a group does not have.
RAREFY_API int64_t parameter_count(const Structure& structure, const Shapes& shapes, const Removal& removal);

/// Multiply-accumulates of the recorded run: the sum over costs of factor * product of the slices left on each axis.
RAREFY_API double mac_count(const Structure& structure, const Removal& removal);

/// All three; an empty removal removes nothing.
RAREFY_API Counts count(const Structure& structure, const Shapes& shapes, const Removal& removal = {});

}  // namespace rarefy::pruning
