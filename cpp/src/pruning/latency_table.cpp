#include <ATen/Parallel.h>
#include <ATen/core/grad_mode.h>
#include <c10/util/Exception.h>
#include <fmt/ranges.h>
#include <rarefy/pruning/latency_table.h>

#include <algorithm>
#include <chrono>
#include <map>
#include <numeric>
#include <set>

#include "graph/call.h"
#include "operator_call.h"

namespace rarefy::pruning {
namespace {

using Shares = std::map<int32_t, double>;

double steady_seconds() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

/// The groups along one dimension of a value.
Axis axis_of(const graph::Graph& graph, const Structure& structure, int64_t value, int64_t dim) {
  Axis axis;
  axis.size = graph.values[value].sizes.at(static_cast<size_t>(dim));
  for (size_t g = 0; g < structure.groups.size(); ++g) {
    int64_t slices = 0;
    for (const auto& member : structure.groups[g].members) {
      if (member.value == value && member.dim == dim) {
        slices +=
            std::count_if(member.unit_of_index.begin(), member.unit_of_index.end(), [](auto u) { return u >= 0; });
      }
    }
    if (slices > 0) {
      axis.groups.emplace_back(static_cast<int32_t>(g), slices);
    }
  }
  return axis;
}

/// Widths to measure of a group: multiples of what vectorized kernels compute at once, at most `points` of them.
Widths grid(const Group& group, int64_t smallest, const LatencyOptions& options) {
  const auto& first = group.members.front().unit_of_index;
  const int64_t slices =
      std::max<int64_t>(1, std::count_if(first.begin(), first.end(), [](auto u) { return u >= 0; }) / group.units);
  int64_t channels = 8;
  while (channels > 1 && group.units * slices < 8 * channels) {
    channels /= 2;
  }
  const int64_t multiple = std::lcm(channels, options.round_to);
  int64_t step = multiple / std::gcd(multiple, slices);
  while ((group.units + step - 1) / step > options.points) {
    step *= 2;
  }
  Widths out;
  for (int64_t width = step; width < group.units; width += step) {
    if (width >= smallest) {
      out.push_back(width);
    }
  }
  out.push_back(group.units);
  return out;
}

/// The sizes of an axis at which an operator is measured.
std::vector<int64_t> sizes_to_measure(const Axis& axis, const LatencyTable& table, int64_t points) {
  std::set<int64_t> sizes;
  if (axis.groups.size() == 1) {
    Widths widths = table.units;
    const auto group = static_cast<size_t>(axis.groups[0].first);
    for (auto width : table.widths[group]) {
      widths[group] = width;
      sizes.insert(axis.size_at(widths, table.units));
    }
  } else {
    Widths least = table.units;
    for (const auto& [group, slices] : axis.groups) {
      least[static_cast<size_t>(group)] = table.widths[static_cast<size_t>(group)].front();
    }
    const int64_t low = axis.size_at(least, table.units);
    for (int64_t i = 0; i < points; ++i) {
      const int64_t size = low + (axis.size - low) * i / points;
      sizes.insert(std::max<int64_t>(low, size / 8 * 8));
    }
  }
  sizes.insert(axis.size);
  return {sizes.begin(), sizes.end()};
}

/// Which share of a value's elements each group has, read off what computes it.
class Composition {
 public:
  Composition(const graph::Graph& graph, const Structure& structure) : graph_(graph), shares_(graph.values.size()) {
    for (size_t g = 0; g < structure.groups.size(); ++g) {
      for (const auto& member : structure.groups[g].members) {
        if (member.value >= 0) {
          const auto& units = member.unit_of_index;
          const auto slices = std::count_if(units.begin(), units.end(), [](auto u) { return u >= 0; });
          auto& share = shares_[static_cast<size_t>(member.value)][static_cast<int32_t>(g)];
          share = std::max(share, static_cast<double>(slices) / static_cast<double>(units.size()));
        }
      }
    }
  }

  /// The shares in the results of a node that does not change which channels there are: the mean of its inputs'.
  Shares mean_of_inputs(const graph::Node& node) const {
    Shares out;
    double elements = 0;
    for (const auto& ids : node.input_values) {
      for (auto id : ids) {
        if (id < 0 || !at::isFloatingType(graph_.values[id].dtype)) {
          continue;
        }
        double numel = 1;
        for (auto size : graph_.values[id].sizes) {
          numel *= static_cast<double>(size);
        }
        elements += numel;
        for (const auto& [group, share] : shares_[static_cast<size_t>(id)]) {
          out[group] += share * numel;
        }
      }
    }
    for (auto& [group, share] : out) {
      share /= elements;
    }
    return out;
  }

  void set_outputs(const graph::Node& node, const Shares& shares) {
    for (auto id : node.outputs) {
      if (id >= 0 && graph_.values[id].origin == graph::Origin::intermediate) {
        shares_[static_cast<size_t>(id)] = shares;
      }
    }
  }

 private:
  const graph::Graph& graph_;
  std::vector<Shares> shares_;
};

Shares shares_of(const Axis& axis) {
  Shares out;
  for (const auto& [group, slices] : axis.groups) {
    out[group] = static_cast<double>(slices) / static_cast<double>(axis.size);
  }
  return out;
}

std::vector<std::pair<int32_t, double>> factor(const Shares& shares) { return {shares.begin(), shares.end()}; }

/// The multiply-accumulates of a node as factors.
std::vector<std::vector<std::pair<int32_t, double>>> factors_of(const Cost& cost) {
  std::vector<std::vector<std::pair<int32_t, double>>> out;
  for (const auto& axis : cost.axes) {
    Shares shares;
    for (const auto& [group, unit] : axis) {
      if (group >= 0) {
        shares[group] += 1.0 / static_cast<double>(axis.size());
      }
    }
    if (!shares.empty()) {
      out.push_back(factor(shares));
    }
  }
  return out;
}

double median(std::vector<double> values) {
  const auto middle = values.begin() + static_cast<int64_t>(values.size() / 2);
  std::nth_element(values.begin(), middle, values.end());
  return *middle;
}

/// The grids of all weighted operators, each distinct one measured once.
class Measurements {
 public:
  Measurements(const graph::Graph& graph, const LatencyOptions& options) : graph_(graph), options_(options) {}

  void add(OperatorTime* time, const WeightedOperator& op) {
    const auto key = fmt::format("{} {} {}", OperatorCalls::key(graph_, graph_.nodes[time->node], op),
                                 fmt::join(time->outputs, ","), fmt::join(time->inputs, ","));
    auto& distinct = distinct_[key];
    distinct.op = op;
    distinct.times.push_back(time);
  }

  void run() {
    double work = 0, done = 0;
    for (auto& [key, distinct] : distinct_) {
      work += weight_of(distinct);
    }
    for (auto& [key, distinct] : distinct_) {
      auto& first = *distinct.times.front();
      const double share = weight_of(distinct) / work;
      first.relative = options_.time_operator ? asked(first) : measured(first, distinct.op, options_.seconds * share);
      const double full = first.relative.back();
      for (auto& value : first.relative) {
        value /= full;
      }
      for (auto* time : distinct.times) {
        time->relative = first.relative;
      }
      done += share;
      if (options_.progress) {
        options_.progress(std::min(done, 1.0));
      }
    }
  }

 private:
  struct Distinct {
    WeightedOperator op;
    std::vector<OperatorTime*> times;
  };

  /// What an operator's part in the budget is proportional to: its time and its points, each with some time to set up.
  static double weight_of(const Distinct& distinct) {
    const auto& time = *distinct.times.front();
    return static_cast<double>(time.outputs.size() * time.inputs.size()) * (1.0 + time.milliseconds);
  }

  std::vector<double> asked(const OperatorTime& time) const {
    std::vector<double> out;
    for (auto outputs : time.outputs) {
      for (auto inputs : time.inputs) {
        out.push_back(options_.time_operator(graph_.nodes[time.node], outputs, inputs));
        TORCH_CHECK_VALUE(out.back() > 0, "[measure_latency] time_operator must return positive milliseconds, got ",
                          out.back());
      }
    }
    return out;
  }

  /// Rounds over all points, so that what disturbs the machine for a moment disturbs neighbours alike.
  std::vector<double> measured(const OperatorTime& time, const WeightedOperator& op, double budget) {
    constexpr int kFewest = 3, kMost = 15;
    const graph::Node& node = graph_.nodes[time.node];
    const double begin = steady_seconds();
    std::vector<std::vector<double>> samples(time.outputs.size() * time.inputs.size());
    auto timing = options_.timing;
    timing.warmup = 0;
    timing.runs = 1;
    timing.seconds = 1e-9;
    for (int round = -1; round < kFewest || (round < kMost && steady_seconds() - begin < budget); ++round) {
      size_t point = 0;
      for (auto outputs : time.outputs) {
        for (auto inputs : time.inputs) {
          auto stack = calls_.arguments(graph_, node, op, outputs, inputs);
          const auto once = graph::measure([&] { graph::call(node, stack); }, timing);
          if (round >= 0) {  // the first round makes the kernels
            samples[point].push_back(once.milliseconds);
          }
          ++point;
        }
      }
    }
    std::vector<double> out;
    for (auto& sample : samples) {
      out.push_back(median(std::move(sample)));
    }
    return out;
  }

  const graph::Graph& graph_;
  const LatencyOptions& options_;
  std::map<std::string, Distinct> distinct_;
  OperatorCalls calls_;
};

/// The place of a size among ascending measured ones: the index below, and how far it is to the next.
std::pair<size_t, double> locate(const std::vector<int64_t>& sizes, int64_t size) {
  if (sizes.size() == 1 || size <= sizes.front()) {
    return {0, 0.0};
  }
  const auto above = std::lower_bound(sizes.begin(), sizes.end(), size);
  if (above == sizes.end()) {
    return {sizes.size() - 1, 0.0};
  }
  const auto index = static_cast<size_t>(above - sizes.begin());
  if (*above == size) {
    return {index, 0.0};
  }
  return {index - 1,
          static_cast<double>(size - sizes[index - 1]) / static_cast<double>(sizes[index] - sizes[index - 1])};
}

}  // namespace

void LatencyOptions::validate() const {
  TORCH_CHECK_VALUE(seconds > 0, "[LatencyOptions] seconds must be positive, got ", seconds);
  TORCH_CHECK_VALUE(points >= 2, "[LatencyOptions] points must be 2 or more, got ", points);
  TORCH_CHECK_VALUE(round_to > 0, "[LatencyOptions] round_to must be positive, got ", round_to);
  TORCH_CHECK_VALUE(noise >= 0 && noise < 1, "[LatencyOptions] noise must be in [0, 1), got ", noise);
  timing.validate();
}

int64_t Axis::size_at(const Widths& widths, const Widths& full) const {
  int64_t out = size;
  for (const auto& [group, slices] : groups) {
    const auto g = static_cast<size_t>(group);
    out -= slices - slices * widths[g] / full[g];
  }
  return out;
}

double LatencyTable::predict(const OperatorTime& time, const Widths& at) const {
  if (time.relative.empty()) {
    double left = 1;
    for (const auto& shares : time.factors) {
      double kept = 1;
      for (const auto& [group, share] : shares) {
        const auto g = static_cast<size_t>(group);
        kept -= share * (1.0 - static_cast<double>(at[g]) / static_cast<double>(units[g]));
      }
      left *= kept;
    }
    return call + (time.milliseconds - call) * left;
  }
  const auto [row, down] = locate(time.outputs, time.output.size_at(at, units));
  const auto [column, right] = locate(time.inputs, time.input.size_at(at, units));
  const size_t columns = time.inputs.size();
  const auto value = [&](size_t r, size_t c) { return time.relative[r * columns + c]; };
  const auto in_row = [&](size_t r) {
    return right == 0.0 ? value(r, column) : (1 - right) * value(r, column) + right * value(r, column + 1);
  };
  return time.milliseconds * (down == 0.0 ? in_row(row) : (1 - down) * in_row(row) + down * in_row(row + 1));
}

double LatencyTable::predict(const Widths& at) const {
  TORCH_CHECK_VALUE(at.size() == units.size(), "[LatencyTable] there must be a width for each of the ", units.size(),
                    " groups, got ", at.size());
  double sum = 0;
  for (const auto& time : operators) {
    sum += predict(time, at);
  }
  return rest + scale * sum;
}

LatencyTable measure_latency(const graph::Graph& graph, const Structure& structure, double whole,
                             const std::vector<double>& node_times, const LatencyOptions& options) {
  options.validate();
  TORCH_CHECK_VALUE(whole > 0, "[measure_latency] the model's time must be positive, got ", whole);
  TORCH_CHECK_VALUE(node_times.size() == graph.nodes.size(), "[measure_latency] there must be a time for each of the ",
                    graph.nodes.size(), " nodes, got ", node_times.size());
  TORCH_CHECK_VALUE(options.smallest.empty() || options.smallest.size() == structure.groups.size(),
                    "[measure_latency] smallest must have ", structure.groups.size(), " widths (one per group), got ",
                    options.smallest.size());
  const at::NoGradGuard no_grad;
  LatencyTable table;
  table.whole = whole;
  table.noise = options.noise;
  table.threads = at::get_num_threads();
  for (size_t g = 0; g < structure.groups.size(); ++g) {
    table.units.push_back(structure.groups[g].units);
    table.widths.push_back(grid(structure.groups[g], options.smallest.empty() ? 1 : options.smallest[g], options));
  }

  std::map<int64_t, const Cost*> costs;
  for (const auto& cost : structure.costs) {
    costs[cost.node] = &cost;
  }
  Composition composition(graph, structure);
  Measurements measurements(graph, options);
  std::map<size_t, WeightedOperator> weighted;  // by index into the operators
  table.operators.reserve(graph.schedule.size());
  double sum = 0;
  table.call = graph.schedule.empty() ? 0 : whole;
  for (auto index : graph.schedule) {
    const graph::Node& node = graph.nodes[index];
    OperatorTime time;
    time.node = index;
    time.milliseconds = node_times[index];
    table.call = std::min(table.call, time.milliseconds);
    sum += time.milliseconds;
    if (const auto op = weighted_operator(graph, node)) {
      time.output = axis_of(graph, structure, op->weight, op->output_dim);
      time.input = axis_of(graph, structure, op->weight, op->input_dim);
      composition.set_outputs(node, shares_of(time.output));
      if (!time.output.groups.empty() || !time.input.groups.empty()) {
        time.outputs = sizes_to_measure(time.output, table, options.points);
        time.inputs = sizes_to_measure(time.input, table, options.points);
        weighted[table.operators.size()] = *op;
      }
    } else {
      const auto shares = composition.mean_of_inputs(node);
      composition.set_outputs(node, shares);
      if (const auto cost = costs.find(index); cost != costs.end()) {
        time.factors = factors_of(*cost->second);
      } else if (!shares.empty()) {
        time.factors = {factor(shares)};
      }
    }
    table.operators.push_back(std::move(time));
  }
  for (const auto& [index, op] : weighted) {
    measurements.add(&table.operators[index], op);
  }
  measurements.run();
  table.scale = sum > whole ? whole / sum : 1.0;
  table.rest = std::max(0.0, whole - sum);
  return table;
}

LatencyTable measure_latency(const graph::Graph& graph, const Structure& structure,
                             const std::function<void()>& forward, const LatencyOptions& options) {
  options.validate();
  const auto whole = graph::measure(forward, options.timing);
  return measure_latency(graph, structure, whole.milliseconds, graph::time_nodes(graph, forward, options.timing),
                         options);
}

}  // namespace rarefy::pruning
