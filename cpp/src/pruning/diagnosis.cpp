#include "diagnosis.h"

#include <ATen/Functions.h>
#include <fmt/format.h>
#include <fmt/ranges.h>

#include <algorithm>
#include <set>

#include "propagation.h"
#include "reference.h"

namespace rarefy::pruning {
namespace {

/// The operators that the model's own code called, in order.
std::vector<int64_t> called(const graph::Graph& graph) {
  std::vector<int64_t> out;
  for (size_t i = 0; i < graph.nodes.size(); ++i) {
    if (graph.nodes[i].parent < 0) {
      out.push_back(static_cast<int64_t>(i));
    }
  }
  return out;
}

std::string sizes_text(const std::vector<int64_t>& sizes) { return fmt::format("[{}]", fmt::join(sizes, ", ")); }

/// Of x[a:b] and x[i] along channels: what is wrong with the numbers that the pruned model used; empty when nothing is.
std::string wrong_place(const graph::Graph& before, const graph::Node& node, const RemovedView& removed,
                        const graph::Node& now) {
  const bool slice = node.op.name == "aten::slice", select = node.op.name == "aten::select";
  if ((!slice && !select) || node.input(0) < 0 || !node.inputs[1].isInt()) {
    return "";
  }
  const auto& sizes = before.values[node.input(0)].sizes;
  const auto wrap = [](int64_t value, int64_t size) { return value < 0 ? value + size : std::min(value, size); };
  const int64_t dim = wrap(node.inputs[1].toInt(), static_cast<int64_t>(sizes.size()));
  const auto* places = removed.along(node.input(0), dim);
  if (!places) {
    return "";
  }
  for (size_t i = 2; i < (slice ? 4u : 3u); ++i) {
    const int64_t default_value = i == 2 ? 0 : sizes[dim];
    const int64_t was = node.inputs[i].isInt() ? wrap(node.inputs[i].toInt(), sizes[dim]) : default_value;
    const auto size_now = static_cast<int64_t>(places->kept.size());
    const int64_t is = now.inputs[i].isInt() ? wrap(now.inputs[i].toInt(), size_now) : (i == 2 ? 0 : size_now);
    const int64_t wanted = std::lower_bound(places->kept.begin(), places->kept.end(), was) - places->kept.begin();
    if (is != wanted) {
      return fmt::format("holds a number of its own: it takes from {} where the channels that are left need {}", is,
                         wanted);
    }
  }
  return "";
}

double tolerance_of(at::ScalarType dtype) {
  switch (dtype) {
    case at::kDouble:
      return 1e-9;
    case at::kHalf:
    case at::kBFloat16:
      return 0.05;
    default:
      return 1e-4;
  }
}

}  // namespace

Comparison compare(const std::vector<at::Tensor>& expected, const std::vector<at::Tensor>& found, double tolerance) {
  Comparison out;
  double worst = -1;
  if (expected.size() != found.size()) {
    out.failure = fmt::format("it returns {} tensors in place of {}", found.size(), expected.size());
    return out;
  }
  for (size_t i = 0; i < expected.size(); ++i) {
    const auto &a = expected[i], &b = found[i];
    if (a.sizes() != b.sizes()) {
      out.failure = fmt::format("output {} has shape {} in place of {}", i, sizes_text(b.sizes().vec()),
                                sizes_text(a.sizes().vec()));
      return out;
    }
    if (!a.is_floating_point() || a.numel() == 0) {
      continue;
    }
    const auto x = a.to(at::kDouble), y = b.to(at::kDouble);
    const auto same = x.eq(y).logical_or(x.isnan().logical_and(y.isnan()));
    const auto finite = at::isfinite(x);
    const double largest = at::where(finite, x.abs(), at::zeros({}, x.options())).max().item<double>();
    const double error = at::where(same, at::zeros({}, x.options()), (x - y).abs()).max().item<double>();
    const double relative = largest > 0 ? error / largest : error;
    const double allowed = tolerance > 0 ? tolerance : tolerance_of(a.scalar_type());
    if (!(relative <= allowed)) {
      out.failure =
          fmt::format("output {} differs by {:.3g} of its largest value, more than {:.3g}", i, relative, allowed);
      out.difference = relative;
      return out;
    }
    if (relative / allowed > worst) {
      worst = relative / allowed;
      out.difference = relative;
    }
  }
  return out;
}

std::optional<Culprit> find_culprit(const graph::Graph& before, const RemovedView& removed, const Recording& after) {
  const auto expected = called(before), found = called(after.graph);
  for (size_t i = 0; i < expected.size(); ++i) {
    const auto& node = before.nodes[expected[i]];
    if (i >= found.size()) {
      return std::pair(expected[i], "cannot run on fewer channels: " + after.failure);
    }
    const auto& now = after.graph.nodes[found[i]];
    if (now.op != node.op) {
      return std::pair(expected[i], fmt::format("is not reached: the model calls {} instead", now.op.name));
    }
    if (const auto moved = wrong_place(before, node, removed, now); !moved.empty()) {
      return std::pair(expected[i], moved);
    }
    const bool last = i + 1 == found.size();
    for (size_t k = 0; k < node.outputs.size(); ++k) {
      if (node.outputs[k] < 0) {
        continue;
      }
      if (k >= now.outputs.size()) {
        return last && !after.failure.empty()
                   ? std::pair(expected[i], "fails on fewer channels: " + after.failure)
                   : std::pair(expected[i],
                               fmt::format("gives {} results in place of {}", now.outputs.size(), node.outputs.size()));
      }
      const auto wanted = removed.sizes(node.outputs[k]);
      const auto& sizes = after.graph.values[now.outputs[k]].sizes;
      if (wanted != sizes) {
        return std::pair(expected[i],
                         fmt::format("holds a size of its own: it gives {} where the channels that are left "
                                     "need {}",
                                     sizes_text(sizes), sizes_text(wanted)));
      }
    }
  }
  return std::nullopt;
}

std::optional<Culprit> find_difference(const graph::Graph& graph, const Structure& structure,
                                       const RemovedView& removed, bool fold, const graph::Graph& after) {
  const int64_t first = first_difference(graph, removed, fold, after, 1e-3);
  if (first < 0) {
    return std::nullopt;
  }
  std::vector<int64_t> producer(graph.values.size(), -1);
  for (auto index : graph.schedule) {
    if (index > first) {
      break;
    }
    for (auto id : graph.nodes[index].outputs) {
      if (id >= 0) {
        producer[id] = index;
      }
    }
  }
  std::vector<int64_t> todo{first};
  std::set<int64_t> seen;
  while (!todo.empty()) {
    const int64_t index = todo.front();
    todo.erase(todo.begin());
    if (index < 0 || !seen.insert(index).second) {
      continue;
    }
    for (const auto& ids : graph.nodes[index].input_values) {
      for (auto id : ids) {
        if (id >= 0 && removed.any(id)) {
          return std::pair(index, fmt::format("feeds {}, whose result depends on how many channels there are",
                                              graph.nodes[first].describe()));
        }
      }
    }
    for (const auto& ids : graph.nodes[index].input_values) {
      for (auto id : ids) {
        if (id >= 0 && structure.provenance->depends_on_input[id]) {
          todo.push_back(producer[id]);
        }
      }
    }
  }
  return std::nullopt;
}

std::vector<Resize> find_resizes(const graph::Graph& graph, const RemovedView& removed) {
  std::vector<Resize> out;
  for (auto index : called(graph)) {
    const auto& node = graph.nodes[index];
    bool flows = true;
    const auto add = [&](int64_t before, int64_t after) {
      out.push_back({index, node.module, node.source, before, after, flows});
    };
    for (auto id : node.outputs) {
      if (id < 0) {
        continue;
      }
      flows = removed.any(id);
      const auto now = removed.sizes(id);
      const auto& sizes = graph.values[id].sizes;
      for (size_t d = 0; d < sizes.size(); ++d) {
        // What stays is said too: 4 heads of width 4 become 3 of width 4.
        for (const auto& argument : node.inputs) {
          const bool held =
              (argument.isInt() && argument.toInt() == sizes[d]) || (argument.isIntList() && [&] {
                const auto values = argument.toIntVector();
                return std::any_of(values.begin(), values.end(), [&](int64_t v) { return v == sizes[d] || v == -1; });
              }());
          if (held) {
            add(sizes[d], now[d]);
            break;
          }
        }
      }
    }
    flows = true;
    if (node.op.name == "aten::slice" && node.inputs.size() > 3 && node.input(0) >= 0) {
      // x[a:b] along channels: both ends move by what is removed before them.
      const int64_t rank = static_cast<int64_t>(graph.values[node.input(0)].sizes.size());
      const int64_t dim = node.inputs[1].toInt() < 0 ? node.inputs[1].toInt() + rank : node.inputs[1].toInt();
      if (const auto* places = removed.along(node.input(0), dim)) {
        for (size_t i : {2, 3}) {
          if (node.inputs[i].isInt() && node.inputs[i].toInt() > 0 &&
              node.inputs[i].toInt() <= graph.values[node.input(0)].sizes[dim]) {
            const int64_t end = node.inputs[i].toInt();
            const auto after = std::lower_bound(places->kept.begin(), places->kept.end(), end) - places->kept.begin();
            if (after != end) {
              add(end, after);
            }
          }
        }
      }
    }
  }
  return out;
}

}  // namespace rarefy::pruning
