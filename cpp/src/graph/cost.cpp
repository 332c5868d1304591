#include <rarefy/graph/cost.h>

#include <algorithm>
#include <map>
#include <optional>
#include <string_view>

#include "call.h"
#include "dataflow.h"
#include "operators.h"
#include "text.h"

namespace rarefy::graph {
namespace {

int64_t product(c10::IntArrayRef sizes) {
  int64_t out = 1;
  for (auto size : sizes) {
    out *= size;
  }
  return out;
}

/// All sizes but the last one, multiplied.
int64_t rows(const std::vector<int64_t>& sizes) { return product(c10::IntArrayRef(sizes).slice(0, sizes.size() - 1)); }

/// Counts the work of single operators.
class Counter {
 public:
  explicit Counter(const Graph& graph) : graph_(graph) {}

  /// Nothing when the operator's work is not known.
  std::optional<Cost> work(const Node& node) const {
    if (auto macs = contraction(node)) {
      Cost cost;
      cost.macs = *macs;
      cost.flops = 2 * *macs;
      if (kind_of(node.op) == Kind::attention) {
        const auto& q = sizes(node.input(0));
        cost.flops += 5 * rows(q) * sizes(node.input(1)).at(q.size() - 2);
      }
      return cost;
    }
    if (auto flops = other(node)) {
      Cost cost;
      cost.flops = *flops;
      return cost;
    }
    return std::nullopt;
  }

 private:
  const std::vector<int64_t>& sizes(int64_t id) const { return graph_.values.at(id).sizes; }
  int64_t numel(int64_t id) const { return id < 0 ? 0 : graph_.values.at(id).numel(); }

  /// The elements of the first result, or of what is changed in place when the operator returns nothing.
  int64_t result(const Node& node) const { return numel(node.outputs.empty() ? node.input(0) : node.outputs[0]); }

  int64_t convolution(const Node& node, bool transposed) const {
    // One per element of a weight's slice and place of the result (of the input when transposed).
    const auto& weight = sizes(node.input(1));
    return numel(transposed ? node.input(0) : node.outputs.at(0)) * product(c10::IntArrayRef(weight).slice(1));
  }

  int64_t recurrent(const Node& node) const {
    const auto name = short_name(node);
    const int64_t in = node.input(0);
    if (name.ends_with("_cell")) {
      return numel(in) / sizes(in).back() * (numel(node.input(2)) + numel(node.input(3)));
    }
    // Packed sequences have (data, batch_sizes, states, parameters): every row of data is one step.
    const size_t at = node.op.overload_name == "data" ? 3 : 2;
    const int64_t steps = numel(in) / sizes(in).back();
    int64_t macs = 0;
    for (auto id : node.input_values.at(at)) {
      macs += sizes(id).size() == 2 ? steps * numel(id) : 0;  // biases have one dimension
    }
    return macs;
  }

  std::optional<int64_t> contraction(const Node& node) const {
    const auto name = short_name(node);
    const auto last = [&](int64_t id) { return sizes(id).empty() ? 1 : sizes(id).back(); };
    if (name == "rarefy::integer_conv" || name == "rarefy::integer_conv_forward" || name == "rarefy::quantized_conv") {
      return convolution(node, false);
    }
    if (name == "rarefy::integer_linear" || name == "rarefy::integer_linear_forward" ||
        name == "rarefy::quantized_linear") {
      return numel(node.outputs.at(0)) * last(node.input(0));
    }
    if (name == "rarefy::sparse_linear") {
      return numel(node.input(1)) * (numel(node.input(0)) / std::max<int64_t>(last(node.input(0)), 1));
    }
    if (name == "addmv" || name == "addbmm" || name == "addr") {
      const int64_t a = node.input(1);
      return name == "addr" ? result(node) : name == "addmv" ? numel(a) : numel(a) * last(node.input(2));
    }
    switch (kind_of(node.op)) {
      case Kind::linear:
        return numel(node.outputs.at(0)) * last(node.input(0));
      case Kind::addmm:
        return numel(node.outputs.at(0)) * last(node.input(1));
      case Kind::matmul:
        return numel(node.outputs.at(0)) * last(node.input(0));
      case Kind::baddbmm:
        return numel(node.outputs.at(0)) * last(node.input(1));
      case Kind::convolution:
        return convolution(node, false);
      case Kind::transposed_convolution:
        return convolution(node, true);
      case Kind::general_convolution:
        return convolution(node, argument(node, "transposed").toBool());
      case Kind::attention: {
        const auto& q = sizes(node.input(0));
        const auto keys = sizes(node.input(1)).at(q.size() - 2);
        return rows(q) * keys * (q.back() + sizes(node.input(2)).back());
      }
      case Kind::recurrent:
        return recurrent(node);
      default:
        return std::nullopt;
    }
  }

  int64_t pooling(const Node& node) const {
    const auto name = short_name(node);
    if (name.find("adaptive") != std::string::npos) {
      return numel(node.input(0));
    }
    if (name.find("upsample") != std::string::npos) {
      const int64_t taps = name.find("trilinear") != std::string::npos  ? 8
                           : name.find("bicubic") != std::string::npos  ? 16
                           : name.find("bilinear") != std::string::npos ? 4
                           : name.find("linear") != std::string::npos   ? 2
                                                                        : 0;
      return 2 * taps * result(node);
    }
    const auto window = argument(node, "kernel_size");
    if (!window.isIntList()) {
      return 0;  // padding by reflection
    }
    auto extents = window.toIntVector();
    const auto dims = static_cast<size_t>(name.find("1d") != std::string::npos   ? 1
                                          : name.find("2d") != std::string::npos ? 2
                                                                                 : 3);
    extents.resize(dims, extents.empty() ? 1 : extents[0]);
    return result(node) * product(extents);
  }

  /// The floating-point operations of what multiplies no matrices.
  std::optional<int64_t> other(const Node& node) const {
    const int64_t in = node.input_values.empty() ? 0 : numel(node.input(0));
    switch (kind_of(node.op)) {
      case Kind::elementwise:
      case Kind::prelu:
      case Kind::fake_quantize:
        return result(node);
      case Kind::glu:
        return 2 * result(node);
      case Kind::batch_norm: {
        const auto training = argument(node, "training");
        return training.isBool() && training.toBool() ? 7 * in : 2 * in;
      }
      case Kind::instance_norm:
      case Kind::layer_norm:
      case Kind::group_norm:
        return 7 * in;
      case Kind::rms_norm:
        return 4 * in;
      case Kind::weight_norm:
        return 3 * in;
      case Kind::reduction:
        return in;
      case Kind::along:
        return short_name(node).find("softmax") != std::string::npos ? 5 * in : in;
      case Kind::spatial1:
      case Kind::spatial2:
      case Kind::spatial3:
        return pooling(node);
      case Kind::identity:
      case Kind::like:
      case Kind::factory:
      case Kind::range:
      case Kind::copy:
      case Kind::movement:
      case Kind::concatenation:
      case Kind::stacking:
      case Kind::padding:
      case Kind::query:
      case Kind::embedding:
      case Kind::index:
        return 0;
      default:
        return std::nullopt;
    }
  }

  const Graph& graph_;
};

int64_t bytes(const Value& value) { return value.numel() * static_cast<int64_t>(c10::elementSize(value.dtype)); }

void add_parameter(Cost& cost, const Value& value) {
  cost.parameters += value.numel();
  cost.parameter_bytes += bytes(value);
}

/// The module and all around it, the model first: "", "layer1", "layer1.0".
std::vector<std::string> modules_around(const std::string& module) {
  std::vector<std::string> out{""};
  for (size_t at = 0; !module.empty() && at != std::string::npos;) {
    at = module.find('.', at + 1);
    out.push_back(module.substr(0, at));
  }
  return out;
}

/// Puts modules below those that they are in, in the order of their first operator.
std::vector<ModuleCost> module_costs(const Graph& graph, const Costs& costs) {
  std::map<std::string, ModuleCost> found;
  std::map<std::string, std::vector<std::string>> inside;
  const auto visit = [&](const std::string& module, const auto& add) {
    std::string around;
    for (const auto& path : modules_around(module)) {
      const auto [entry, is_new] = found.try_emplace(path);
      if (is_new) {
        entry->second.module = path;
        if (!path.empty()) {
          inside[around].push_back(path);
        }
      }
      add(entry->second);
      around = path;
    }
  };
  visit("", [](ModuleCost&) {});
  for (const auto& item : costs.operators) {
    const Node& node = graph.nodes[item.node];
    Cost work = item.cost;
    work.parameters = work.parameter_bytes = 0;
    visit(node.module, [&](ModuleCost& module) {
      ++module.operators;
      module.cost += work;
      if (!node.outputs.empty() && node.outputs[0] >= 0) {
        module.output_sizes = graph.values[node.outputs[0]].sizes;
      }
    });
  }
  for (const auto& value : graph.values) {
    if (value.origin == Origin::parameter) {
      const auto dot = value.name.rfind('.');
      visit(dot == std::string::npos ? "" : value.name.substr(0, dot),
            [&](ModuleCost& module) { add_parameter(module.cost, value); });
    }
  }
  std::vector<ModuleCost> out;
  const auto append = [&](const auto& self, const std::string& module) -> void {
    out.push_back(found.at(module));
    for (const auto& path : inside[module]) {
      self(self, path);
    }
  };
  append(append, "");
  return out;
}

}  // namespace

Cost& Cost::operator+=(const Cost& other) {
  macs += other.macs;
  flops += other.flops;
  parameters += other.parameters;
  parameter_bytes += other.parameter_bytes;
  activation_bytes += other.activation_bytes;
  return *this;
}

Costs count_costs(const Graph& graph) {
  const Counter counter(graph);
  Costs out;
  std::vector<char> seen(graph.values.size(), 0);
  // An operator that is not known: what is known inside of it.
  const auto work = [&](const auto& self, int64_t index) -> std::optional<Cost> {
    const Node& node = graph.nodes[index];
    auto known = counter.work(node);
    if (known || node.children_end <= index + 1) {
      return known;
    }
    Cost sum;
    for (int64_t child = index + 1; child < node.children_end;) {
      const auto part = self(self, child);
      if (!part) {
        return std::nullopt;
      }
      sum += *part;
      child = std::max(graph.nodes[child].children_end, child + 1);
    }
    return sum;
  };
  for (auto index : graph.schedule) {
    const Node& node = graph.nodes[index];
    OperatorCost item{index, {}};
    if (auto known = work(work, index)) {
      item.cost = *known;
    } else {
      out.uncounted.push_back(index);
    }
    for (const auto& ids : node.input_values) {
      for (auto id : ids) {
        if (id >= 0 && graph.values[id].origin == Origin::parameter && !seen[id]) {
          seen[id] = 1;
          add_parameter(item.cost, graph.values[id]);
        }
      }
    }
    for (auto id : node.outputs) {
      if (id < 0) {
        continue;
      }
      // The first result in a memory stands for all of it, though what made it may have run inside of the operator.
      const int64_t memory = graph.values[id].memory < 0 ? id : graph.values[id].memory;
      if (graph.values[memory].origin == Origin::intermediate && !seen[memory]) {
        seen[memory] = 1;
        item.cost.activation_bytes += bytes(graph.values[memory]);
      }
    }
    out.total += item.cost;
    out.operators.push_back(item);
    out.names.push_back(node.describe());
  }
  out.total.parameters = out.total.parameter_bytes = 0;
  for (const auto& value : graph.values) {
    if (value.origin == Origin::parameter) {
      add_parameter(out.total, value);
    }
  }
  out.modules = module_costs(graph, out);
  return out;
}

}  // namespace rarefy::graph
