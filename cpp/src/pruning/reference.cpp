#include "reference.h"

#include <ATen/Functions.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/core/grad_mode.h>

#include <algorithm>

#include "graph/call.h"
#include "propagation.h"
#include "slices.h"

namespace rarefy::pruning {

using c10::IValue;
using graph::Graph;
using graph::Kind;
using graph::Node;
using graph::Origin;

namespace {

at::Tensor indices(const std::vector<int64_t>& values, const at::Tensor& like) {
  return at::tensor(values, at::TensorOptions().dtype(at::kLong).device(like.device()));
}

at::Tensor select(const at::Tensor& x, int64_t dim, const RemovedPlaces* places) {
  return places && x.defined() ? take(x, {{dim, places->kept}}) : x;
}

at::Tensor select(const at::Tensor& x, const RemovedPlaces* places) {
  return places ? select(x, places->dim, places) : x;
}

/// x at its full size again: what was kept in its places, `fill` (of each place along dim; undefined: zero) in the others.
at::Tensor scatter(const at::Tensor& x, int64_t dim, const RemovedPlaces* places, const at::Tensor& fill) {
  if (!places) {
    return x;
  }
  return spread(x, dim, places->kept, static_cast<int64_t>(places->kept.size() + places->removed.size()), fill);
}

class Run {
 public:
  Run(const Graph& graph, const RemovedView& removed, bool fold)
      : graph_(graph), removed_(removed), fold_(fold), env_(graph.values.size()), constant_(graph.values.size(), 0) {
    last_use_.assign(graph.values.size(), -1);
    for (auto index : graph.schedule) {
      for (const auto& ids : graph.nodes[index].input_values) {
        for (auto id : ids) {
          if (id >= 0) {
            last_use_[id] = index;
          }
        }
      }
    }
    for (size_t id = 0; id < graph.values.size(); ++id) {
      const auto& value = graph.values[id];
      if (value.origin != Origin::intermediate) {
        env_[id] = value.tensor;
      }
      constant_[id] = value.origin != Origin::intermediate && value.origin != Origin::input;
    }
    for (auto id : graph.outputs) {
      last_use_[id] = static_cast<int64_t>(graph.nodes.size());
    }
  }

  void step(int64_t index) {
    visit(graph_.nodes[index]);
    for (const auto& ids : graph_.nodes[index].input_values) {
      for (auto id : ids) {
        if (id >= 0 && last_use_[id] == index && graph_.values[id].origin == Origin::intermediate) {
          env_[id] = at::Tensor();
        }
      }
    }
  }

  const at::Tensor& value(int64_t id) const { return env_[id]; }

  Reference run() {
    const at::NoGradGuard no_grad;
    for (auto index : graph_.schedule) {
      step(index);
    }
    Reference out;
    for (auto id : graph_.outputs) {
      out.outputs.push_back(env_[id]);
    }
    out.folds = std::move(folds_);
    return out;
  }

 private:
  int64_t rank(int64_t value) const { return static_cast<int64_t>(graph_.values[value].sizes.size()); }

  at::Tensor tensor(int64_t id) const { return id < 0 ? at::Tensor() : env_[id]; }

  /// The arguments of a node by position, to be changed and called.
  torch::jit::Stack stack_of(const Node& node) {
    return graph::arguments(node, [&](int64_t id, bool written) {
      if (written && graph_.values[id].origin != Origin::intermediate && env_[id].is_same(graph_.values[id].tensor)) {
        env_[id] = env_[id].clone();  // the model's own tensor stays as it is
      }
      return env_[id];
    });
  }

  void store(const Node& node, const std::vector<at::Tensor>& results) {
    for (size_t i = 0; i < node.outputs.size() && i < results.size(); ++i) {
      if (node.outputs[i] >= 0) {
        env_[node.outputs[i]] = results[i];
      }
    }
  }

  void set_constant(const Node& node, bool constant) {
    for (auto id : node.outputs) {
      if (id >= 0) {
        constant_[id] = constant;
      }
    }
  }

  std::vector<int64_t> tensors(const Node& node) const {
    std::vector<int64_t> out;
    for (const auto& ids : node.input_values) {
      std::copy_if(ids.begin(), ids.end(), std::back_inserter(out), [](int64_t id) { return id >= 0; });
    }
    return out;
  }

  /// Zero in the removed places along dim: what a consumer ignores.
  at::Tensor ignored(const at::Tensor& x, int64_t dim, const RemovedPlaces* places) const {
    return places ? x.index_fill(dim, indices(places->removed, x), 0) : x;
  }

  /// The constants of the removed channels of x along dim, one per removed place; undefined when they are not constant.
  at::Tensor constants(int64_t x, int64_t dim, const RemovedPlaces& places) const {
    if (!constant_[x]) {
      return {};
    }
    const auto slices = env_[x].index_select(dim, indices(places.removed, env_[x])).movedim(dim, 0).flatten(1);
    const auto first = slices.select(1, 0);
    return slices.eq(first.unsqueeze(1)).all().item<bool>() ? first : at::Tensor();
  }

  bool used_once(int64_t value) const {
    int64_t uses = 0;
    for (auto index : graph_.schedule) {
      const auto all = tensors(graph_.nodes[index]);
      uses += std::count(all.begin(), all.end(), value);
    }
    return uses == 1;
  }

  bool is_own(int64_t value, Origin origin) const {
    return value >= 0 && graph_.values[value].origin == origin && used_once(value);
  }

  /// Where a constant that reaches this consumer can go: its bias, or the running mean behind it. -1: nowhere.
  std::pair<int64_t, double> takes_constants(const Node& node, int64_t bias) const {
    if (bias >= 0) {
      return is_own(bias, Origin::parameter) ? std::pair<int64_t, double>{bias, 1.0}
                                             : std::pair<int64_t, double>{-1, 0.0};
    }
    const int64_t result = node.outputs[0];
    if (graph_.values[result].is_output) {
      return {-1, 0.0};
    }
    const Node* only = nullptr;
    for (auto index : graph_.schedule) {
      const auto all = tensors(graph_.nodes[index]);
      if (std::find(all.begin(), all.end(), result) != all.end()) {
        if (only) {
          return {-1, 0.0};
        }
        only = &graph_.nodes[index];
      }
    }
    if (only && only->op.name == "aten::batch_norm" && !only->inputs[5].toBool() &&
        is_own(only->input(3), Origin::buffer)) {
      return {only->input(3), -1.0};
    }
    return {-1, 0.0};
  }

  /// A product with a weight of the model: [out, in, ...]. Kept outputs come from kept inputs, and from constants of
  /// removed inputs where they can be folded; a removed output is its bias.
  void weighted(const Node& node, int64_t x, int64_t weight, int64_t bias, int64_t x_dim, int64_t in_dim,
                int64_t out_dim, int64_t result_dim, bool exact_constants,
                const std::function<void(torch::jit::Stack&)>& adjust) {
    const auto* in = removed_.along(x, x_dim);
    const auto* rows = removed_.along(weight, out_dim);
    const auto* out = removed_.along(node.outputs[0], result_dim);
    auto stack = stack_of(node);
    Kept kept;
    if (rows) {
      kept[out_dim] = rows->kept;
    }
    at::Tensor constant_part;  // what constants of removed inputs add to every place, [kept outputs]
    if (in && fold_ && exact_constants) {
      const auto values = constants(x, x_dim, *in);
      const auto [target, sign] = takes_constants(node, bias);
      if (values.defined() && target >= 0 && values.ne(0).any().item<bool>()) {
        auto of_removed = kept;
        of_removed[in_dim] = in->removed;
        const auto columns = take(env_[weight], of_removed);
        constant_part = of_constants(node, x, weight, values, columns);
        // The kernel summed over its extent.
        const auto by_input = columns.movedim(in_dim, 0);
        const auto sums = by_input.reshape({by_input.size(0), by_input.size(1), -1}).sum(2);
        auto delta = at::matmul(values, sums) * sign;
        delta = scatter(delta, 0, rows, {});
        folds_.push_back({graph_.values[target].name, graph_.values[weight].name, values.ne(0).sum().item<int64_t>(),
                          delta.to(env_[target].scalar_type())});
      }
    }
    if (const auto* columns = removed_.along(weight, in_dim)) {
      kept[in_dim] = columns->kept;
    }
    for (size_t i = 0; i < node.input_values.size(); ++i) {
      const int64_t id = node.input(i);
      if (id < 0) {
        continue;
      }
      if (id == weight) {
        stack[i] = kept.empty() ? env_[weight] : take(env_[weight], kept);
      } else if (id == x) {
        stack[i] = select(env_[x], in);
      } else if (id == bias) {
        stack[i] = select(env_[bias], 0, removed_.along(bias, 0));
      }
    }
    adjust(stack);
    auto results = graph::call(node, std::move(stack));
    if (constant_part.defined()) {
      std::vector<int64_t> shape(results[0].dim(), 1);
      shape[result_dim] = -1;
      results[0].add_(constant_part.view(shape));
    }
    results[0] = scatter(results[0], result_dim, out, tensor(bias));
    store(node, results);
    set_constant(node, out != nullptr);
  }

  /// The operator on one place that holds nothing but constants of removed channels, without its bias: [kept outputs].
  at::Tensor of_constants(const Node& node, int64_t x, int64_t weight, const at::Tensor& values,
                          const at::Tensor& columns) {
    std::vector<int64_t> shape{1, values.size(0)}, column{1, values.size(0)};
    if (rank(weight) > 2) {
      const auto dilation = node.inputs[5].toIntVector();
      for (int64_t d = 2; d < rank(weight); ++d) {
        const auto factor = dilation[std::min<size_t>(d - 2, dilation.size() - 1)];
        shape.push_back((graph_.values[weight].sizes[d] - 1) * factor + 1);
        column.push_back(1);
      }
    }
    auto stack = stack_of(node);
    const bool adds_first = graph::kind_of(node.op) == Kind::addmm;
    for (size_t i = 0; i < node.input_values.size(); ++i) {
      const int64_t id = node.input(i);
      if (id == weight) {
        stack[i] = columns;
      } else if (id == x) {
        stack[i] = values.view(column).expand(shape).contiguous();
      } else if (id >= 0) {
        stack[i] = adds_first ? IValue(at::zeros({1}, values.options())) : IValue();
      }
    }
    return graph::call(node, std::move(stack))[0].reshape({-1});
  }

  void convolution(const Node& node, bool transposed) {
    const int64_t x = node.input(0), weight = node.input(1), bias = node.input(2);
    const int64_t channel = rank(x) - (rank(weight) - 2) - 1;
    const bool general = graph::kind_of(node.op) == Kind::general_convolution;
    const size_t groups_at = general ? 8 : 6;
    const int64_t groups = node.inputs[groups_at].toInt();
    if (graph_.values[weight].origin == Origin::intermediate || (transposed && groups > 1)) {
      generic(node, {{0, channel}}, channel, bias);
      return;
    }
    const int64_t in = graph_.values[x].sizes[channel];
    const auto* removed = removed_.along(x, channel);
    bool no_padding = !transposed && groups == 1;
    const auto& padding = node.inputs[4];
    if (padding.isIntList()) {
      for (auto pad : padding.toIntVector()) {
        no_padding = no_padding && pad == 0;
      }
    } else {
      no_padding = false;
    }
    weighted(node, x, weight, bias, channel, transposed ? 0 : 1, transposed ? 1 : 0, channel, no_padding,
             [&](torch::jit::Stack& stack) {
               if (groups > 1 && in == groups && removed) {
                 stack[groups_at] = static_cast<int64_t>(removed->kept.size());
               }
             });
  }

  /// A product whose weight is computed, or of two activations: the consumed places of the arguments are ignored.
  void generic(const Node& node, const std::vector<std::pair<size_t, int64_t>>& consumed, int64_t result_dim,
               int64_t added) {
    auto stack = stack_of(node);
    bool from_weights = false;
    for (const auto& [i, dim] : consumed) {
      const int64_t id = node.input(i);
      stack[i] = ignored(env_[id], dim, removed_.along(id, dim));
    }
    for (auto id : tensors(node)) {
      from_weights = from_weights || !dependent(id);
    }
    auto results = graph::call(node, std::move(stack));
    const auto* out = result_dim < 0 ? nullptr : removed_.along(node.outputs[0], result_dim);
    if (out && from_weights) {
      results[0] = scatter(select(results[0], out), result_dim, out,
                           added >= 0 && env_[added].dim() == 1 ? env_[added] : at::Tensor());
    }
    store(node, results);
    set_constant(node, out != nullptr && from_weights);
  }

  /// False for parameters and what is computed from them alone.
  bool dependent(int64_t id) const { return removed_.depends_on_input(id); }

  void norm(const Node& node, int64_t dim, const std::vector<size_t>& parameters, int64_t shift,
            const std::function<void(torch::jit::Stack&, const RemovedPlaces&)>& adjust) {
    const int64_t x = node.input(0);
    const auto* places = removed_.along(x, dim);
    auto stack = stack_of(node);
    if (places) {
      stack[0] = select(env_[x], places);
      for (auto i : parameters) {
        const int64_t id = node.input(i);
        if (id >= 0) {
          const int64_t mine = rank(id) - (rank(x) - dim);
          stack[i] = env_[id].index_select(std::max<int64_t>(mine, 0), indices(places->kept, env_[id]));
        }
      }
      adjust(stack, *places);
    }
    auto results = graph::call(node, std::move(stack));
    if (places) {
      const auto fill = shift >= 0 && env_[shift].dim() == 1 ? env_[shift] : at::Tensor();
      results[0] = scatter(results[0], dim, places, fill);
    }
    store(node, results);
    set_constant(node, places != nullptr);
  }

  void recurrent(const Node& node) {
    // A removed hidden channel has no weights in or out, and so stays at zero.
    auto stack = stack_of(node);
    for (size_t i = 0; i < node.input_values.size(); ++i) {
      std::vector<at::Tensor> masked;
      for (auto id : node.input_values[i]) {
        auto value = env_[id];
        for (const auto& places : removed_.of(id)) {
          value = ignored(value, places.dim, &places);
        }
        masked.push_back(value);
      }
      if (stack[i].isTensor()) {
        stack[i] = masked.at(0);
      } else if (!masked.empty()) {
        stack[i] = c10::List<at::Tensor>(masked);
      }
    }
    store(node, graph::call(node, std::move(stack)));
    set_constant(node, false);
  }

  void reduction(const Node& node) {
    const int64_t x = node.input(0);
    auto stack = stack_of(node);
    bool consumed = false;
    for (const auto& places : removed_.of(x)) {
      // A dimension that is reduced has no removed places in the result.
      std::vector<int64_t> dims;
      const auto handle = c10::Dispatcher::singleton().findSchema(node.op);
      const auto& arguments = handle->schema().arguments();
      for (size_t i = 0; i < node.inputs.size(); ++i) {
        if (arguments[i].name() == "dim" && node.inputs[i].isIntList()) {
          dims = node.inputs[i].toIntVector();
        } else if (arguments[i].name() == "dim" && node.inputs[i].isInt()) {
          dims = {node.inputs[i].toInt()};
        }
      }
      const bool over = dims.empty() || std::any_of(dims.begin(), dims.end(),
                                                    [&](int64_t d) { return (d < 0 ? d + rank(x) : d) == places.dim; });
      if (over) {
        stack[0] = select(stack[0].toTensor(), &places);
        consumed = true;
      }
    }
    store(node, graph::call(node, std::move(stack)));
    set_constant(node, constant_[x] && !consumed);
  }

  void visit(const Node& node);

  const Graph& graph_;
  const RemovedView& removed_;
  bool fold_;
  std::vector<at::Tensor> env_;
  std::vector<char> constant_;  // of each value: its removed places do not depend on the model's input
  std::vector<int64_t> last_use_;
  std::vector<Fold> folds_;
};

void Run::visit(const Node& node) {
  const auto no_adjust = [](torch::jit::Stack&) {};
  switch (graph::kind_of(node.op)) {
    case Kind::linear: {
      const int64_t x = node.input(0), weight = node.input(1), bias = node.input(2);
      const int64_t out = rank(node.outputs[0]) - 1;
      if (graph_.values[weight].origin == Origin::parameter && rank(weight) == 2) {
        weighted(node, x, weight, bias, rank(x) - 1, 1, 0, out, true, no_adjust);
      } else {
        generic(node, {{0, rank(x) - 1}}, out, bias);
      }
      return;
    }
    case Kind::addmm: {
      const int64_t x = node.input(1), weight = node.input(2), bias = node.input(0);
      if (graph_.values[weight].origin == Origin::parameter && rank(bias) == 1) {
        weighted(node, x, weight, bias, 1, 0, 1, 1, true, no_adjust);
      } else {
        generic(node, {{1, 1}}, 1, bias);
      }
      return;
    }
    case Kind::matmul:
      generic(node, {{0, rank(node.input(0)) - 1}}, rank(node.outputs[0]) - 1, -1);
      return;
    case Kind::baddbmm:
      generic(node, {{1, 2}}, 2, node.input(0));
      return;
    case Kind::convolution:
      convolution(node, false);
      return;
    case Kind::transposed_convolution:
      convolution(node, true);
      return;
    case Kind::general_convolution:
      convolution(node, node.inputs[6].toBool());
      return;
    case Kind::attention: {
      const int64_t q = node.input(0);
      generic(node, {{0, rank(q) - 1}}, -1, -1);
      return;
    }
    case Kind::layer_norm:
    case Kind::rms_norm: {
      const bool rms = graph::kind_of(node.op) == Kind::rms_norm;
      const int64_t x = node.input(0);
      const auto count = static_cast<int64_t>(node.inputs[1].toIntVector().size());
      int64_t dim = rank(x) - 1;
      for (int64_t d = rank(x) - count; d < rank(x); ++d) {
        if (removed_.along(x, d)) {
          dim = d;
        }
      }
      const std::vector<size_t> parameters = rms ? std::vector<size_t>{2} : std::vector<size_t>{2, 3};
      norm(node, dim, parameters, rms ? -1 : node.input(3), [&](torch::jit::Stack& stack, const RemovedPlaces& places) {
        auto shape = node.inputs[1].toIntVector();
        shape[places.dim - (rank(x) - count)] = static_cast<int64_t>(places.kept.size());
        stack[1] = shape;
      });
      return;
    }
    case Kind::group_norm: {
      if (node.op.name != "aten::group_norm") {
        break;
      }
      const int64_t x = node.input(0);
      const int64_t channels = graph_.values[x].sizes[1], groups = node.inputs[1].toInt();
      norm(node, 1, {2, 3}, node.input(3), [&](torch::jit::Stack& stack, const RemovedPlaces& places) {
        if (groups == channels) {
          stack[1] = static_cast<int64_t>(places.kept.size());
        }
      });
      return;
    }
    case Kind::along: {
      const bool normalizes = node.op.name.find("softmax") != std::string::npos;
      if (!normalizes) {
        break;
      }
      const int64_t x = node.input(0), given = node.inputs[1].toInt();
      norm(node, given < 0 ? given + rank(x) : given, {}, -1, [](torch::jit::Stack&, const RemovedPlaces&) {});
      return;
    }
    case Kind::weight_norm: {
      // The length of what is kept: removed columns do not count.
      auto stack = stack_of(node);
      const int64_t v = node.input(0), dim = node.inputs[2].toInt();
      for (const auto& places : removed_.of(v)) {
        stack[0] = places.dim == dim ? stack[0] : IValue(select(stack[0].toTensor(), &places));
      }
      auto results = graph::call(node, std::move(stack));
      for (const auto& places : removed_.of(v)) {
        results[0] = places.dim == dim ? results[0] : scatter(results[0], places.dim, &places, {});
      }
      store(node, results);
      set_constant(node, true);
      return;
    }
    case Kind::embedding: {
      auto results = graph::call(node, stack_of(node));
      const int64_t last = rank(node.outputs[0]) - 1;
      const auto* out = removed_.along(node.outputs[0], last);
      results[0] = out ? ignored(results[0], last, out) : results[0];
      store(node, results);
      set_constant(node, out != nullptr);
      return;
    }
    case Kind::recurrent:
      recurrent(node);
      return;
    case Kind::reduction:
      reduction(node);
      return;
    default:
      break;
  }
  // Everything else acts place by place, or only moves. A result is constant in its removed places when all that meets
  // there is.
  store(node, graph::call(node, stack_of(node)));
  bool constant = true;
  const auto kind = graph::kind_of(node.op);
  const bool joins = kind == Kind::concatenation || kind == Kind::stacking;
  for (auto id : tensors(node)) {
    const bool mine = !dependent(id) || (removed_.any(id) ? static_cast<bool>(constant_[id]) : joins);
    constant = constant && mine;
  }
  switch (kind) {
    case Kind::identity:
    case Kind::elementwise:
    case Kind::copy:
    case Kind::movement:
    case Kind::concatenation:
    case Kind::stacking:
    case Kind::padding:
    case Kind::batch_norm:
    case Kind::instance_norm:
    case Kind::prelu:
    case Kind::glu:
    case Kind::fake_quantize:
    case Kind::spatial1:
    case Kind::spatial2:
    case Kind::spatial3:
      set_constant(node, constant);
      break;
    default:
      set_constant(node, false);
  }
}

}  // namespace

Reference run_reference(const Graph& graph, const RemovedView& removed, bool fold) {
  return Run(graph, removed, fold).run();
}

int64_t first_difference(const Graph& graph, const RemovedView& removed, bool fold, const Graph& after,
                         double tolerance) {
  if (graph.schedule.size() != after.schedule.size()) {
    return -1;
  }
  const at::NoGradGuard no_grad;
  const RemovedView nothing(after);
  Run expected(graph, removed, fold), found(after, nothing, false);
  for (size_t k = 0; k < graph.schedule.size(); ++k) {
    const auto& node = graph.nodes[graph.schedule[k]];
    const auto& now = after.nodes[after.schedule[k]];
    if (node.op != now.op || node.outputs.size() != now.outputs.size()) {
      return -1;
    }
    expected.step(graph.schedule[k]);
    found.step(after.schedule[k]);
    for (size_t i = 0; i < node.outputs.size(); ++i) {
      if (node.outputs[i] < 0 || now.outputs[i] < 0) {
        continue;
      }
      auto a = expected.value(node.outputs[i]);
      const auto& b = found.value(now.outputs[i]);
      if (!a.defined() || !b.defined() || !a.is_floating_point()) {
        continue;  // not used later
      }
      for (const auto& places : removed.of(node.outputs[i])) {
        a = select(a, &places);
      }
      if (a.sizes() != b.sizes() || a.numel() == 0) {
        continue;
      }
      const double largest = a.abs().max().item<double>();
      if ((a - b).abs().max().item<double>() > tolerance * largest) {
        return graph.schedule[k];
      }
    }
  }
  return -1;
}

}  // namespace rarefy::pruning
