#include <ATen/Functions.h>

#include <algorithm>

#include "propagation.h"

// Normalizations and other operators with one parameter per channel.
namespace rarefy::pruning {

void Propagator::channel_norm(const Node& node, int64_t channel_dim, const std::vector<int64_t>& parameters) {
  const int64_t x = node.input(0);
  auto input = operand(x);
  std::vector<int64_t> others;
  for (int64_t d = 0; d < rank(x); ++d) {
    if (d != channel_dim) {
      others.push_back(d);
    }
  }
  reduce(input.fields, others, false);
  std::vector<Operand> operands{input};
  for (auto id : parameters) {
    if (id < 0 || graph_.values[id].numel() == 1) {
      continue;
    }
    Operand parameter = operand(id);
    for (auto& field : parameter.fields) {
      set_role(field, Role::affine);
      std::vector<int64_t> shape(rank(x), 1);
      shape[channel_dim] = parameter.sizes[0];
      field.labels = field.labels.reshape(shape);
      field.version = -1;
    }
    const int64_t channels = parameter.sizes[0];
    parameter.sizes.assign(rank(x), 1);
    parameter.sizes[channel_dim] = channels;
    operands.push_back(std::move(parameter));
  }
  auto fields = combine(std::move(operands));
  for (auto& field : fields) {
    field.leaf = -1;
  }
  set(node.outputs[0], std::move(fields));
}

void Propagator::layer_norm(const Node& node, const std::vector<size_t>& parameters) {
  const int64_t x = node.input(0);
  const auto count = static_cast<int64_t>(node.inputs[1].toIntVector().size());
  std::vector<Operand> operands{operand(x)};
  for (auto i : parameters) {
    if (node.input(i) >= 0) {
      operands.push_back(operand(node.input(i), rank(x)));
      for (const auto& field : operands.back().fields) {
        set_role(field, Role::affine);
      }
    }
  }
  auto fields = combine(std::move(operands));
  for (auto& field : fields) {
    // Statistics over what is kept: channels may go as long as they are all that the norm runs over.
    std::vector<int64_t> inside, varying = field.dims();
    for (auto d : varying) {
      if (d >= rank(x) - count) {
        inside.push_back(d);
      }
    }
    if (!inside.empty() && inside.size() < varying.size()) {
      unite_along(labels_, field, inside);
    }
    field.leaf = -1;
  }
  set(node.outputs[0], std::move(fields));
}

void Propagator::group_norm(const Node& node) {
  const int64_t x = node.input(0);
  // group_norm(x, groups, weight, bias) and native_group_norm(x, weight, bias, N, C, HxW, groups, eps)
  const bool native = node.op.name == "aten::native_group_norm";
  const int64_t groups = node.inputs[native ? 6 : 1].toInt();
  const int64_t weight = node.input(native ? 1 : 2), bias = node.input(native ? 2 : 3);
  const int64_t channels = sizes(x)[1];
  channel_norm(node, 1, {weight, bias});
  if (groups == channels || groups == 1) {
    return;
  }
  auto fields = this->fields(node.outputs[0]);
  for (auto& field : fields) {
    Field grouped = field;
    grouped.labels = field.labels.reshape({-1}).reshape({groups, channels / groups});
    grouped.version = -1;
    unite_along(labels_, grouped, {0});
  }
  set(node.outputs[0], std::move(fields));
}

void Propagator::fake_quantize(const Node& node) {
  const int64_t x = node.input(0);
  const auto axis = node.inputs[3];
  if (axis.isInt()) {
    const int64_t dim = axis.toInt() < 0 ? axis.toInt() + rank(x) : axis.toInt();
    std::vector<Operand> operands{operand(x)};
    for (size_t i : {1, 2}) {
      Operand parameter = operand(node.input(i));
      const int64_t size = parameter.sizes[0];
      std::vector<int64_t> shape(rank(x), 1);
      shape[dim] = size;
      for (auto& field : parameter.fields) {
        set_role(field, Role::affine);
        field.labels = field.labels.reshape(shape);
        field.leaf = -1;
        field.version = -1;
      }
      parameter.sizes = shape;
      if (at::isFloatingType(graph_.values[node.input(i)].dtype)) {
        operands.push_back(std::move(parameter));  // the zero points, integers, follow the scales
      }
    }
    auto out = combine(std::move(operands));
    for (const auto& field : fields(x)) {
      for (auto& rounded : out) {
        if (at::equal(field.labels, rounded.labels)) {  // still the rows and columns of a weight
          rounded.leaf = field.leaf;
          rounded.leaf_dim = field.leaf_dim;
        }
      }
    }
    set(node.outputs[0], std::move(out));
  } else {
    set(node.outputs[0], fields(x));
  }
}

}  // namespace rarefy::pruning
