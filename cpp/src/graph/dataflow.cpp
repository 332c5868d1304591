#include "dataflow.h"

#include <ATen/core/dispatch/Dispatcher.h>

#include "call.h"

namespace rarefy::graph {

Dataflow dataflow(const Graph& graph) {
  Dataflow out;
  out.reads.resize(graph.nodes.size());
  out.written.resize(graph.nodes.size());
  out.consumers.resize(graph.values.size());
  struct Write {
    int64_t node = -1;
    int64_t at = -1;  // place in the schedule
  };
  std::vector<Write> made(graph.values.size());     // the node that gave the value
  std::vector<Write> changed(graph.values.size());  // of a memory: the last node that changed something in it
  const auto memory = [&](int64_t id) { return graph.values[id].memory < 0 ? id : graph.values[id].memory; };
  const auto writer = [&](int64_t id) {
    const auto& change = changed[memory(id)];
    return change.at > made[id].at ? change.node : made[id].node;
  };
  for (size_t at = 0; at < graph.schedule.size(); ++at) {
    const int64_t index = graph.schedule[at];
    const Node& node = graph.nodes[index];
    const Write here{index, static_cast<int64_t>(at)};
    const auto handle = c10::Dispatcher::singleton().findSchema(node.op);
    for (size_t i = 0; i < node.input_values.size(); ++i) {
      for (auto id : node.input_values[i]) {
        if (id < 0) {
          continue;
        }
        out.reads[index].push_back({id, writer(id)});
        if (out.consumers[id].empty() || out.consumers[id].back() != index) {
          out.consumers[id].push_back(index);
        }
        if (handle && writes_argument(handle->schema(), i)) {
          out.written[index].push_back(id);
        }
      }
    }
    for (auto id : out.written[index]) {
      changed[memory(id)] = here;
    }
    for (auto id : node.outputs) {
      // What an operator gives back as it is (dropout in evaluation) is still the one before.
      if (id >= 0 && made[id].node < 0 && graph.values[id].origin == Origin::intermediate) {
        made[id] = here;
      }
    }
  }
  for (const auto& write : made) {
    out.maker.push_back(write.node);
  }
  for (auto id : graph.outputs) {
    out.output_writers.push_back(writer(id));
  }
  return out;
}

}  // namespace rarefy::graph
