#pragma once

#include <rarefy/export.h>
#include <rarefy/graph/graph.h>

#include <string>

namespace rarefy::graph {

struct RAREFY_API SvgOptions {
  bool constants = false;  // draw what depends on no input (masks, positions, weights computed from parameters) too
  bool movement = true;    // draw runs of operators that only move elements one by one; false: each run is one box
};

/// A drawing of the scheduled operators, inputs above, outputs below: one box each, coloured by what it does, with
/// operator, module, shape of the result and MACs. A box has the operator's line of Graph::to_string as its tooltip.
/// Boxes lie in layers, each below all that it reads (Sugiyama, Tagawa & Toda, 1981); edges that cross layers have a
/// place of their own in each of them, so that none runs through a box. Operators that make no tensor are left out.
RAREFY_API std::string to_svg(const Graph& graph, const SvgOptions& options = {});

}  // namespace rarefy::graph
