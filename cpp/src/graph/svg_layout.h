#pragma once

#include <cstdint>
#include <utility>
#include <vector>

namespace rarefy::graph {

/// A drawing in layers: boxes, and the places that edges have in the layers that they cross.
struct Layout {
  struct Item {
    int64_t box = -1;     // -1: a place where an edge passes
    int64_t source = -1;  // of an edge: the box that it comes from
    double width = 0;
    double x = 0;                       // of the centre
    std::vector<int64_t> above, below;  // items of the neighbouring layers that edges come from and go to
  };
  std::vector<Item> items;                   // the boxes first, in the order in which they were given
  std::vector<std::vector<int64_t>> layers;  // from left to right
};

/// Places `widths.size()` boxes with edges from lower to higher numbers. Edges from one box share their way down.
Layout lay_out(const std::vector<double>& widths, const std::vector<std::pair<int64_t, int64_t>>& edges);

}  // namespace rarefy::graph
