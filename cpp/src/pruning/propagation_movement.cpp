#include <ATen/Functions.h>

#include <algorithm>

#include "graph/call.h"
#include "propagation.h"

// Operators that put elements elsewhere: they run on the labels themselves.
namespace rarefy::pruning {

using c10::IValue;

std::vector<at::Tensor> Propagator::run_on_labels(const Node& node, const at::Tensor& labels) {
  static const auto reshapes = {"aten::view", "aten::_unsafe_view", "aten::_reshape_alias", "aten::reshape"};
  if (std::find(reshapes.begin(), reshapes.end(), node.op.name) != reshapes.end()) {
    return {at::reshape(labels, sizes(node.outputs[0]))};  // a view of the model's tensor need not be one of the labels
  }
  if (node.op.name.ends_with("channel_shuffle")) {
    const int64_t groups = node.inputs[1].toInt();
    const auto shape = labels.sizes().vec();
    return {labels.reshape({shape[0], groups, shape[1] / groups, -1}).transpose(1, 2).reshape(shape)};
  }
  auto stack = graph::arguments(node, [&](int64_t id, bool) -> at::Tensor {
    if (id == node.input(0)) {
      return labels;
    }
    TORCH_CHECK(graph_.values[id].tensor.defined(), "its argument is not a constant");
    return graph_.values[id].tensor;
  });
  stack.at(0) = labels;
  return graph::call(node, std::move(stack));
}

void Propagator::movement(const Node& node) {
  const int64_t input = node.input(0);
  const auto name = node.op.name.substr(6);
  auto inputs = fields(input);
  if (node.op.overload_name == "dtype") {
    unknown(node);  // the bits read as another type have other places
    return;
  }
  // What divides channels into equal parts does so afterwards too: all parts lose the same places.
  static const auto equal_parts = {"chunk", "unsafe_chunk", "tensor_split", "channel_shuffle",
                                   "native_channel_shuffle"};
  const bool by_number = (name == "split" || name == "unsafe_split") && node.inputs[1].isInt();
  if ((by_number || std::find(equal_parts.begin(), equal_parts.end(), name) != equal_parts.end()) &&
      node.inputs[1].isInt()) {
    const bool shuffle = name.ends_with("channel_shuffle");
    const auto dim_argument = argument(node, "dim");
    const int64_t given = shuffle ? 1 : dim_argument.isInt() ? dim_argument.toInt() : 0;
    const int64_t dim = given < 0 ? given + rank(input) : given;
    const int64_t parts = shuffle ? node.inputs[1].toInt() : static_cast<int64_t>(node.outputs.size());
    if (parts > 1 && sizes(input)[dim] % parts == 0) {
      for (auto& field : inputs) {
        if (field.varies(dim)) {
          auto shape = field.labels.sizes().vec();
          shape[dim] /= parts;
          shape.insert(shape.begin() + dim, parts);
          Field divided = field;
          divided.labels = field.labels.reshape(shape);
          divided.version = -1;
          unite_along(labels_, divided, {dim});
        }
      }
    }
  }
  const bool by_index =
      node.input_values.size() > 1 &&
      std::any_of(node.input_values.begin() + 1, node.input_values.end(), [](const auto& ids) { return !ids.empty(); });
  std::vector<Fields> outputs(node.outputs.size());
  for (const auto& field : inputs) {
    if (by_index) {
      const auto dim_argument = argument(node, "dim");
      const int64_t dim =
          dim_argument.isInt() ? dim_argument.toInt() + (dim_argument.toInt() < 0 ? rank(input) : 0) : -1;
      const bool moved = dim < 0 || field.varies(dim);
      const bool from_input = std::any_of(node.input_values.begin() + 1, node.input_values.end(), [&](const auto& ids) {
        return !ids.empty() && ids[0] >= 0 && out_.depends_on_input[ids[0]];
      });
      if (moved && from_input) {
        pin(labels_, field, reason("chooses channels by the model's input"));
        continue;
      }
    }
    std::vector<at::Tensor> results;
    try {
      results = run_on_labels(node, field.labels.expand(sizes(input)));
    } catch (const c10::Error& error) {
      pin(labels_, field, reason(std::string("cannot be followed: ") + error.what_without_backtrace()));
      continue;
    }
    TORCH_INTERNAL_ASSERT(results.size() == outputs.size(), node.op.name);
    for (size_t i = 0; i < results.size(); ++i) {
      Field moved = field;
      moved.labels = results[i];
      moved.version = -1;
      // A parameter's rows are still its rows after a permutation; leaf_dim keeps the original dimension.
      outputs[i].push_back(std::move(moved));
    }
  }
  if (name == "expand") {
    // Copies of one slice: any number of them will do.
    const int64_t result = node.outputs[0];
    const int64_t in_rank = rank(input), out_rank = rank(result);
    for (int64_t d = 0; d < out_rank; ++d) {
      const int64_t from = d - (out_rank - in_rank);
      if (sizes(result)[d] > 1 && (from < 0 || sizes(input)[from] == 1)) {
        std::vector<int64_t> shape(out_rank, 1);
        shape[d] = sizes(result)[d];
        const auto first = labels_.fresh(shape[d]);
        Field field;
        field.labels = at::arange(first, first + shape[d], at::kInt).view(shape);
        field.weak = true;
        outputs[0].push_back(std::move(field));
      }
    }
  }
  for (size_t i = 0; i < outputs.size(); ++i) {
    set(node.outputs[i], std::move(outputs[i]));
  }
}

void Propagator::index(const Node& node) {
  const int64_t input = node.input(0);
  const bool from_input = std::any_of(node.input_values[1].begin(), node.input_values[1].end(),
                                      [&](int64_t id) { return id >= 0 && out_.depends_on_input[id]; });
  Fields out;
  for (const auto& field : fields(input)) {
    bool indexed = false;  // along a dimension on which the labels depend
    int64_t dim = 0;
    bool constants = true;
    for (auto id : node.input_values[1]) {
      const bool mask = id >= 0 && graph_.values[id].dtype == at::kBool;
      const int64_t covers = mask ? rank(id) : 1;
      for (int64_t k = 0; k < covers; ++k, ++dim) {
        indexed = indexed || (id >= 0 && dim < rank(input) && field.varies(dim));
      }
      constants = constants && (id < 0 || graph_.values[id].tensor.defined());
    }
    if ((from_input && indexed) || !constants) {
      pin(labels_, field, reason("chooses channels by the model's input"));
      continue;
    }
    Field moved = field;
    moved.labels = run_on_labels(node, field.labels.expand(sizes(input)))[0];
    moved.version = -1;
    out.push_back(std::move(moved));
  }
  set(node.outputs[0], std::move(out));
}

void Propagator::concatenation(const Node& node) {
  std::vector<Operand> operands;
  const int64_t result = node.outputs[0];
  const auto dim_argument = argument(node, "dim");
  const int64_t given = dim_argument.isInt() ? dim_argument.toInt() : 0;
  const int64_t dim = given < 0 ? given + rank(result) : given;
  for (auto id : node.input_values[0]) {
    if (rank(id) == rank(result)) {  // torch lets an empty vector pass
      operands.push_back(operand(id));
    }
  }
  const auto refresh = [&] {
    for (auto& operand : operands) {
      std::erase_if(operand.fields, [&](Field& field) { return !update(labels_, field, one_unit()); });
    }
  };
  // Fields across the concatenation must be the same in all operands.
  for (int64_t before = -1; before != labels_.version();) {
    before = labels_.version();
    refresh();
    for (size_t i = 0; i < operands.size(); ++i) {
      for (auto& field : operands[i].fields) {
        if (field.varies(dim)) {
          continue;
        }
        for (size_t j = 0; j < operands.size(); ++j) {
          if (j == i) {
            continue;
          }
          bool matched = false;
          for (auto& other : operands[j].fields) {
            if (overlap(field, other)) {
              if (other.varies(dim)) {
                unite_along(labels_, other, {dim});
              }
              unite(labels_, field, other);
              matched = true;
            }
          }
          if (!matched) {
            pin(labels_, field, reason("meets a tensor whose places there cannot be removed"));
          }
        }
      }
    }
  }
  refresh();
  Fields out;
  const auto along_dim = [&](const Operand& operand) {
    return std::find_if(operand.fields.begin(), operand.fields.end(),
                        [&](const Field& field) { return field.varies(dim); });
  };
  std::vector<int64_t> shape(rank(result), 1);
  bool any = false;
  for (auto& operand : operands) {
    const auto found = along_dim(operand);
    if (found == operand.fields.end()) {
      continue;
    }
    any = true;
    for (auto other = found + 1; other != operand.fields.end(); ++other) {
      if (other->varies(dim)) {
        pin(labels_, *other, reason("concatenates along a dimension of two kinds of channels"));
      }
    }
    for (int64_t d = 0; d < rank(result); ++d) {
      if (d != dim) {
        shape[d] = std::max(shape[d], found->labels.size(d));
      }
    }
  }
  if (any) {
    Field joined;
    joined.weak = true;
    std::vector<at::Tensor> parts;
    for (auto& operand : operands) {
      shape[dim] = operand.sizes[dim];
      const auto found = along_dim(operand);
      if (found != operand.fields.end()) {
        joined.weak = joined.weak && found->weak;
        parts.push_back(found->labels.expand(shape));
      } else {
        const auto first = labels_.fresh(operand.sizes[dim]);
        std::vector<int64_t> one(rank(result), 1);
        one[dim] = operand.sizes[dim];
        Field fixed;
        fixed.labels = at::arange(first, first + operand.sizes[dim], at::kInt).view(one);
        pin(labels_, fixed, reason("takes in a tensor without channels to remove"));
        parts.push_back(fixed.labels.expand(shape));
      }
    }
    joined.labels = at::cat(parts, dim);
    out.push_back(std::move(joined));
  }
  for (const auto& field : operands[0].fields) {
    if (!field.varies(dim)) {
      out.push_back(field);
    }
  }
  set(result, std::move(out));
}

void Propagator::stacking(const Node& node) {
  const int64_t result = node.outputs[0];
  const auto dim_argument = argument(node, "dim");
  const int64_t given = dim_argument.isInt() ? dim_argument.toInt() : 0;
  const int64_t dim = given < 0 ? given + rank(result) : given;
  std::vector<Operand> operands;
  for (auto id : node.input_values[0]) {
    operands.push_back(operand(id));
  }
  auto fields = combine(std::move(operands));
  for (auto& field : fields) {
    field.labels = field.labels.unsqueeze(dim);
  }
  set(result, std::move(fields));
}

void Propagator::padding(const Node& node) {
  const auto pads = node.inputs[1].toIntVector();
  const int64_t in_rank = rank(node.input(0));
  auto fields = this->fields(node.input(0));
  for (auto& field : fields) {
    for (size_t k = 0; 2 * k + 1 < pads.size(); ++k) {
      const int64_t dim = in_rank - 1 - static_cast<int64_t>(k);
      if (!field.varies(dim)) {
        continue;
      }
      std::vector<at::Tensor> parts;
      for (int64_t side = 0; side < 2; ++side) {
        const int64_t amount = pads[2 * k + side];
        if (amount < 0) {
          field.labels = field.labels.narrow(dim, side == 0 ? -amount : 0, field.labels.size(dim) + amount);
        }
      }
      for (int64_t side = 0; side < 2; ++side) {
        const int64_t amount = pads[2 * k + side];
        if (side == 1) {
          parts.push_back(field.labels);
        }
        if (amount > 0) {
          auto shape = field.labels.sizes().vec();
          std::fill(shape.begin(), shape.end(), 1);
          shape[dim] = amount;
          const auto first = labels_.fresh(amount);
          Field fixed;
          fixed.labels = at::arange(first, first + amount, at::kInt).view(shape);
          pin(labels_, fixed, reason("adds a fixed number of channels"));
          auto full = field.labels.sizes().vec();
          full[dim] = amount;
          parts.push_back(fixed.labels.expand(full));
        }
      }
      field.labels = at::cat(parts, dim);
      field.version = -1;
    }
  }
  set(node.outputs[0], std::move(fields));
}

}  // namespace rarefy::pruning
