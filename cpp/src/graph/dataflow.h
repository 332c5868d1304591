#pragma once

#include <rarefy/graph/graph.h>

#include <cstdint>
#include <vector>

namespace rarefy::graph {

/// Which scheduled operator reads what which other one wrote, changes in place through views included.
struct Dataflow {
  struct Read {
    int64_t value = -1;
    int64_t writer = -1;  // the node whose result it is; -1 when no scheduled operator made or changed it
  };
  std::vector<std::vector<Read>> reads;         // of each node of the graph; empty when it is not scheduled
  std::vector<std::vector<int64_t>> written;    // of each node: the values that it changes in place
  std::vector<std::vector<int64_t>> consumers;  // of each value: the scheduled nodes that read it, each once, in order
  std::vector<int64_t> maker;                   // of each value: the scheduled node whose result it is; -1 when none is
  std::vector<int64_t> output_writers;          // of each of Graph::outputs, as Read::writer
};

Dataflow dataflow(const Graph& graph);

}  // namespace rarefy::graph
