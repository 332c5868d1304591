#include <ATen/Functions.h>

#include <algorithm>

#include "propagation.h"

// Operators that multiply and sum: their channels are read off the dimensions that meet.
namespace rarefy::pruning {

namespace {

/// The operand with a dimension of size 1 at `dim`.
Operand unsqueezed(Operand operand, int64_t dim) {
  operand.sizes.insert(operand.sizes.begin() + dim, 1);
  for (auto& field : operand.fields) {
    field.labels = field.labels.unsqueeze(dim);
    field.version = -1;
  }
  return operand;
}

Operand transposed(Operand operand, int64_t a, int64_t b) {
  std::swap(operand.sizes[a], operand.sizes[b]);
  for (auto& field : operand.fields) {
    field.labels = field.labels.transpose(a, b);
    field.version = -1;
  }
  return operand;
}

Operand with_rank(Operand operand, int64_t rank) {
  while (static_cast<int64_t>(operand.sizes.size()) < rank) {
    operand = unsqueezed(std::move(operand), 0);
  }
  return operand;
}

}  // namespace

void Propagator::linear(const Node& node) {
  // out[..., n] = sum_k x[..., k] * weight[n, k] + bias[n], over the dimensions [..., n, k]
  const int64_t x = node.input(0), weight = node.input(1), bias = node.input(2);
  const int64_t virtual_rank = rank(x) + 1;
  std::vector<Operand> operands{unsqueezed(operand(x), rank(x) - 1), with_rank(operand(weight), virtual_rank)};
  if (bias >= 0) {
    auto added = unsqueezed(operand(bias), rank(bias));
    operands.push_back(with_rank(std::move(added), virtual_rank));
  }
  auto fields = contract(std::move(operands), 1);
  if (rank(weight) == 1) {
    for (auto& field : fields) {
      field.labels = field.labels.squeeze(-1);
    }
  }
  set(node.outputs[0], std::move(fields));
}

void Propagator::matmul(const Node& node, int64_t a, int64_t b, int64_t added) {
  // out[..., m, n] = sum_k a[..., m, k] * b[..., k, n], over the dimensions [..., m, n, k]
  auto left = operand(a), right = operand(b);
  const bool vector_left = rank(a) == 1, vector_right = rank(b) == 1;
  if (vector_left) {
    left = unsqueezed(std::move(left), 0);
  }
  if (vector_right) {
    right = unsqueezed(std::move(right), 1);
  }
  const auto common = static_cast<int64_t>(std::max(left.sizes.size(), right.sizes.size()));
  left = unsqueezed(with_rank(std::move(left), common), common - 1);
  right = unsqueezed(transposed(with_rank(std::move(right), common), common - 2, common - 1), common - 2);
  std::vector<Operand> operands{std::move(left), std::move(right)};
  if (added >= 0) {
    auto bias = with_rank(operand(added), common);
    operands.push_back(unsqueezed(std::move(bias), common));
  }
  auto fields = contract(std::move(operands), 1);
  for (auto& field : fields) {
    if (vector_right) {
      field.labels = field.labels.squeeze(-1);
    }
    if (vector_left) {
      field.labels = field.labels.squeeze(vector_right ? -1 : -2);
    }
  }
  set(node.outputs[0], std::move(fields));
}

void Propagator::convolution(const Node& node, bool is_transposed) {
  const int64_t x = node.input(0), weight = node.input(1), bias = node.input(2), result = node.outputs[0];
  const auto groups_argument = argument(node, "groups");
  const int64_t groups = groups_argument.isInt() ? groups_argument.toInt() : 1;
  const int64_t spatial = rank(weight) - 2;
  const int64_t channel = rank(x) - spatial - 1;  // 1, or 0 without a batch
  const int64_t in = sizes(x)[channel], out = sizes(result)[channel];
  const int64_t in_per_group = in / groups, out_per_group = out / groups;

  // The input's channels alone, [in].
  auto input_fields = fields(x);
  std::vector<int64_t> others;
  for (int64_t d = 0; d < rank(x); ++d) {
    if (d != channel) {
      others.push_back(d);
    }
  }
  reduce(input_fields, others, false);
  Operand input{{in}, {}, false};
  for (auto& field : input_fields) {
    field.labels = field.labels.reshape({-1});
    field.version = -1;
    input.fields.push_back(std::move(field));
  }
  // The weight's dimensions: [rows, columns] are [out, in per group], transposed [in, out per group].
  Operand rows{{sizes(weight)[0]}, {}, true}, columns{{sizes(weight)[1]}, {}, true};
  const auto kernel = reason("is a kernel's extent");
  for (auto& field : fields(weight)) {
    const auto dims = field.dims();
    if (dims.size() != 1 || dims[0] > 1) {
      pin(labels_, field, kernel);
      continue;
    }
    set_role(field, (dims[0] == 0) != is_transposed ? Role::output : Role::input);
    auto& side = dims[0] == 0 ? rows : columns;
    field.labels = field.labels.reshape({-1});
    field.version = -1;
    side.fields.push_back(std::move(field));
  }
  Operand added{{out}, {}, true};
  if (bias >= 0) {
    for (auto& field : fields(bias)) {
      set_role(field, Role::output);
      added.fields.push_back(std::move(field));
    }
  }

  // Multiply-accumulates: one per kept element of the weight and place of the result (of the input when transposed).
  LabelledCost cost{current_, 1, {}};
  const auto& places = sizes(is_transposed ? x : result);
  for (int64_t d = 0; d < static_cast<int64_t>(places.size()); ++d) {
    cost.factor *= d == channel ? 1.0 : static_cast<double>(places[d]);
  }
  for (int64_t d = 2; d < rank(weight); ++d) {
    cost.factor *= static_cast<double>(sizes(weight)[d]);
  }
  for (const auto* side : {&rows, &columns}) {
    if (side->fields.empty()) {
      cost.factor *= static_cast<double>(side->sizes[0]);
    } else {
      cost.axes.push_back(side->fields[0].labels);
    }
  }
  out_.costs.push_back(std::move(cost));

  Fields result_fields;
  const auto with_bias = [&](std::vector<Operand> operands, const Operand& vector) {
    if (bias >= 0) {
      operands.push_back(vector);
    }
    return operands;
  };
  const auto per_group = [](Operand operand, int64_t groups) {  // [groups * n] as [groups, n]
    operand.sizes = {groups, operand.sizes[0] / groups};
    for (auto& field : operand.fields) {
      field.labels = field.labels.expand({operand.sizes[0] * operand.sizes[1]}).reshape(operand.sizes);
      field.version = -1;
    }
    return operand;
  };
  const auto flat = [](Fields fields, int64_t groups, int64_t n) {
    for (auto& field : fields) {
      field.labels = field.labels.expand({groups, n}).reshape({-1});
      field.version = -1;
    }
    return fields;
  };
  if (groups == 1) {
    combine({input, is_transposed ? rows : columns});
    result_fields = combine(with_bias({is_transposed ? columns : rows}, added));
  } else if (in_per_group == 1) {
    // A group is one input channel with all of its outputs: it goes as a whole.
    const auto group = [&](const Operand& operand) { return per_group(operand, groups); };
    Fields shared = combine(with_bias({group(input), group(rows)}, group(added)));
    for (auto& field : shared) {
      unite_along(labels_, field, {1});
    }
    for (auto& field : columns.fields) {
      if (columns.sizes[0] > 1) {
        pin(labels_, field, reason("gives every group the same number of channels"));
      }
    }
    result_fields = flat(combine(with_bias({group(is_transposed ? input : rows), group(input)}, group(added))), groups,
                         out_per_group);
  } else {
    // All groups keep the same places, so that they stay equally wide.
    const auto same_places = [&](const Operand& operand) {
      auto grouped = per_group(operand, groups);
      for (auto& field : grouped.fields) {
        if (field.labels.size(1) == 1) {
          pin(labels_, field, reason("has groups of one channel"));
        }
        unite_along(labels_, field, {0});
      }
      return grouped;
    };
    auto slots = columns;
    slots.sizes.insert(slots.sizes.begin(), 1);
    for (auto& field : slots.fields) {
      field.labels = field.labels.unsqueeze(0);
      field.version = -1;
    }
    if (is_transposed) {
      combine({same_places(input), same_places(rows)});
      result_fields = flat(combine(with_bias({slots}, same_places(added))), groups, out_per_group);
    } else {
      combine({same_places(input), slots});
      result_fields = flat(combine(with_bias({same_places(rows)}, same_places(added))), groups, out_per_group);
    }
  }
  std::vector<int64_t> shape(rank(result), 1);
  shape[channel] = out;
  for (auto& field : result_fields) {
    field.labels = field.labels.expand({out}).reshape(shape);
    field.leaf = -1;
    field.version = -1;
  }
  set(result, std::move(result_fields));
}

void Propagator::attention(const Node& node) {
  // scores[..., l, s] = sum_d q[..., l, d] * k[..., s, d];  out[..., l, e] = sum_s softmax(scores)[..., l, s] * v[..., s, e]
  const int64_t query = node.input(0), result = node.outputs[0];
  const int64_t r = rank(query);
  auto q = operand(query), k = operand(node.input(1), r), v = operand(node.input(2), r);
  const auto grouped = argument(node, "enable_gqa");
  if (grouped.isBool() && grouped.toBool()) {
    for (auto* side : {&k, &v}) {
      if (side->sizes[r - 3] == 1) {
        continue;  // one head for all queries, as by broadcasting
      }
      const int64_t repeats = q.sizes[r - 3] / side->sizes[r - 3];
      side->sizes[r - 3] *= repeats;
      for (auto& field : side->fields) {
        if (field.varies(r - 3)) {
          field.labels = field.labels.repeat_interleave(repeats, r - 3);
          field.version = -1;
        }
      }
    }
  }
  std::vector<Operand> scored{unsqueezed(std::move(q), r - 1), unsqueezed(std::move(k), r - 2)};
  const int64_t mask = node.input(3);
  if (mask >= 0) {
    scored.push_back(unsqueezed(operand(mask, r), r));
  }
  // The default scale follows the head's width, which must then stay.
  const bool own_scale = !argument(node, "scale").isNone();
  auto scores = contract(std::move(scored), 1, own_scale);
  reduce(scores, {r - 2, r - 1}, false);  // along the keys by the softmax; queries come in no channels
  Operand weights{sizes(query), scores, false};
  weights.sizes[r - 1] = v.sizes[r - 2];
  auto out =
      contract({unsqueezed(std::move(weights), r - 1), unsqueezed(transposed(std::move(v), r - 2, r - 1), r - 2)}, 1);
  set(result, std::move(out));
}

void Propagator::recurrent(const Node& node) {
  const auto name = node.op.name.substr(6);
  const bool cell = name.ends_with("_cell");
  const int64_t gates = name.starts_with("lstm") ? 4 : name.starts_with("gru") ? 3 : 1;
  const int64_t x = node.input(0);
  // Packed sequences and projections keep their shape.
  if (!cell && node.op.overload_name != "input") {
    unknown(node);
    return;
  }
  std::vector<int64_t> parameters;
  std::vector<int64_t> states = node.input_values[1];
  int64_t layers = 1, directions = 1;
  bool biases = true;
  if (cell) {
    for (size_t i = 2; i < node.input_values.size(); ++i) {
      parameters.push_back(node.input(i));
    }
  } else {
    parameters = node.input_values[2];
    biases = argument(node, "has_biases").toBool();
    layers = argument(node, "num_layers").toInt();
    directions = argument(node, "bidirectional").toBool() ? 2 : 1;
  }
  const size_t each = biases ? 4 : 2;
  if (parameters.size() != each * static_cast<size_t>(layers * directions)) {
    unknown(node);  // projections
    return;
  }
  const int64_t hidden = sizes(parameters[1])[1];
  // One width for all layers and directions, as the modules have: hidden channel h is h everywhere.
  const auto first = labels_.fresh(hidden);
  Field base;
  base.labels = at::arange(first, first + hidden, at::kInt);
  const auto joined = [&](int64_t times) {
    Field field = base;
    field.labels = base.labels.repeat({times});
    field.version = -1;
    return field;
  };
  const auto meet = [&](int64_t value, int64_t dim, const Field& channels, int64_t size, Role role) {
    // The value's labels along dim are those of the channels; a value without labels there pins them.
    if (value < 0) {
      return;
    }
    auto all = fields(value);
    Operand mine{{size}, {}, false};
    for (auto& field : all) {
      if (field.varies(dim)) {
        std::vector<int64_t> others;
        for (auto d : field.dims()) {
          if (d != dim) {
            others.push_back(d);
          }
        }
        unite_along(labels_, field, others);
        set_role(field, role);
        field.labels = field.labels.reshape({-1});
        field.version = -1;
        mine.fields.push_back(field);
      }
    }
    combine({mine, Operand{{size}, {channels}, false}});
  };
  for (int64_t layer = 0; layer < layers; ++layer) {
    for (int64_t direction = 0; direction < directions; ++direction) {
      const size_t at = each * static_cast<size_t>(layer * directions + direction);
      meet(parameters[at], 0, joined(gates), gates * hidden, Role::output);
      meet(parameters[at + 1], 0, joined(gates), gates * hidden, Role::output);
      meet(parameters[at + 1], 1, base, hidden, Role::input);
      if (biases) {
        meet(parameters[at + 2], 0, joined(gates), gates * hidden, Role::output);
        meet(parameters[at + 3], 0, joined(gates), gates * hidden, Role::output);
      }
      if (layer > 0) {
        meet(parameters[at], 1, joined(directions), directions * hidden, Role::input);
      } else {
        // The input's channels, [in].
        const int64_t in = sizes(parameters[at])[1];
        for (auto& field : fields(parameters[at])) {
          if (field.varies(1)) {
            Field columns = field;
            columns.labels = field.labels.reshape({-1});
            columns.version = -1;
            set_role(field, Role::input);
            meet(x, rank(x) - 1, columns, in, Role::affine);
          }
        }
      }
      LabelledCost cost{current_, static_cast<double>(graph_.values[x].numel() / sizes(x).back()), {}};
      cost.axes = {joined(gates).labels, layer > 0 ? joined(directions).labels : at::Tensor()};
      if (layer == 0) {
        cost.axes.pop_back();
        for (auto& field : fields(parameters[at])) {
          if (field.varies(1)) {
            cost.axes.push_back(field.labels.reshape({-1}));
          }
        }
        if (cost.axes.size() == 1) {
          cost.factor *= static_cast<double>(sizes(parameters[at])[1]);
        }
      }
      out_.costs.push_back(cost);
      cost.axes = {joined(gates).labels, base.labels};
      cost.factor = static_cast<double>(graph_.values[x].numel() / sizes(x).back());
      out_.costs.push_back(std::move(cost));
    }
  }
  for (auto state : states) {
    if (state >= 0) {
      meet(state, rank(state) - 1, base, hidden, Role::affine);
    }
  }
  for (size_t i = 0; i < node.outputs.size(); ++i) {
    const int64_t id = node.outputs[i];
    if (id < 0) {
      continue;
    }
    Field field = i == 0 && !cell ? joined(directions) : base;
    field.labels = with_rank(field, rank(id)).labels;
    field.version = -1;
    set(id, {field});
  }
}

}  // namespace rarefy::pruning
