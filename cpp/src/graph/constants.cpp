#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/core/enum_tag.h>
#include <ATen/core/grad_mode.h>
#include <rarefy/graph/constants.h>

#include <algorithm>

#include "call.h"
#include "dataflow.h"

namespace rarefy::graph {
namespace {

int64_t memory(const Graph& graph, int64_t id) { return graph.values[id].memory < 0 ? id : graph.values[id].memory; }

bool is_random(const Node& node) {
  const auto handle = c10::Dispatcher::singleton().findSchema(node.op);
  return !handle || handle->hasTag(at::Tag::nondeterministic_seeded);
}

/// For each node, whether it is constant.
std::vector<char> find_constant(const Graph& graph, const Dataflow& flow) {
  std::vector<char> constant(graph.nodes.size(), 0);
  // Memory that is not followed: changed by an operator that is not constant, or changed after others have read it.
  std::vector<char> excluded(graph.values.size(), 0);
  for (size_t id = 0; id < graph.values.size(); ++id) {
    const auto origin = graph.values[id].origin;
    excluded[id] = origin == Origin::input || origin == Origin::parameter;
  }
  for (bool changed = true; changed;) {
    changed = false;
    const auto exclude = [&](int64_t id) {
      changed = changed || !excluded[memory(graph, id)];
      excluded[memory(graph, id)] = 1;
    };
    std::vector<char> dependent(graph.values.size(), 0);
    std::vector<char> read(graph.values.size(), 0);  // of a memory: by an operator that is not constant
    for (auto index : graph.schedule) {
      const Node& node = graph.nodes[index];
      bool mine = !is_random(node);
      for (const auto& item : flow.reads[index]) {
        mine = mine && !dependent[item.value] && !excluded[memory(graph, item.value)];
      }
      for (auto id : flow.written[index]) {
        // The model's own memory stays as it is.
        mine = mine && graph.values[memory(graph, id)].origin == Origin::intermediate;
      }
      for (auto id : node.outputs) {
        mine = mine && (id < 0 || !excluded[memory(graph, id)]);
      }
      constant[index] = mine;
      for (auto id : flow.written[index]) {
        if (!mine || read[memory(graph, id)]) {
          exclude(id);
        }
      }
      for (auto id : node.outputs) {
        if (id >= 0 && !mine) {
          dependent[id] = 1;
        }
      }
      for (const auto& item : flow.reads[index]) {
        if (!mine) {
          read[memory(graph, item.value)] = 1;
        }
      }
    }
  }
  return constant;
}

}  // namespace

std::vector<int64_t> constant_nodes(const Graph& graph) {
  const auto constant = find_constant(graph, dataflow(graph));
  std::vector<int64_t> out;
  std::copy_if(graph.schedule.begin(), graph.schedule.end(), std::back_inserter(out),
               [&](int64_t index) { return constant[index]; });
  return out;
}

Graph fold_constants(const Graph& graph) {
  const auto flow = dataflow(graph);
  const auto constant = find_constant(graph, flow);
  std::vector<char> kept(graph.values.size(), 0);
  for (auto index : graph.schedule) {
    for (const auto& read : flow.reads[index]) {
      kept[read.value] = kept[read.value] || !constant[index];
    }
  }
  for (auto id : graph.outputs) {
    kept[id] = 1;
  }
  Graph out = graph;
  std::erase_if(out.schedule, [&](int64_t index) { return constant[index]; });
  std::vector<at::Tensor> tensors(graph.values.size());
  for (size_t id = 0; id < graph.values.size(); ++id) {
    if (graph.values[id].origin != Origin::intermediate) {
      tensors[id] = graph.values[id].tensor;
    }
  }
  const at::NoGradGuard no_grad;
  std::vector<int64_t> made;
  for (auto index : graph.schedule) {
    if (!constant[index]) {
      continue;
    }
    const Node& node = graph.nodes[index];
    auto stack = arguments(node, [&](int64_t id, bool) { return tensors[id]; });
    const auto results = call(node, std::move(stack));
    for (size_t i = 0; i < node.outputs.size(); ++i) {
      const int64_t id = node.outputs[i];
      if (id >= 0 && graph.values[id].origin == Origin::intermediate) {
        tensors[id] = results.at(i);
        made.push_back(id);
      }
    }
  }
  for (auto id : made) {
    Value& value = out.values[id];
    if (!kept[id]) {
      continue;
    }
    // A view of a buffer would follow the buffer.
    const bool own = graph.values[memory(graph, id)].origin == Origin::intermediate;
    value.tensor = own ? tensors[id] : tensors[id].clone();
    value.origin = Origin::constant;
    value.producer = -1;
  }
  return out;
}

}  // namespace rarefy::graph
