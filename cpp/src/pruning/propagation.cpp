#include "propagation.h"

#include <ATen/Functions.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/core/grad_mode.h>

#include <algorithm>
#include <set>
#include <unordered_map>

namespace rarefy::pruning {

using graph::Kind;
using graph::Origin;

Propagator::Propagator(const graph::Graph& graph, Provenance& out)
    : graph_(graph), out_(out), labels_(out.labels), made_(graph.values.size(), 0) {
  out_.fields.resize(graph.values.size());
  out_.roles.resize(graph.values.size());
  out_.depends_on_input.assign(graph.values.size(), 0);
  for (auto id : graph.inputs) {
    out_.depends_on_input[id] = 1;
  }
}

// --- fields of values ------------------------------------------------------------------------------------------------

int32_t Propagator::reason(const std::string& text) {
  return labels_.add_reason(current_, current_ < 0 ? text : graph_.nodes[current_].describe() + " " + text);
}

int32_t Propagator::one_unit() {
  if (one_unit_.first != current_) {
    one_unit_ = {current_, reason("would be left with nothing: one unit only")};
  }
  return one_unit_.second;
}

Propagator::Fields Propagator::fields(int64_t value) {
  if (value < 0) {
    return {};
  }
  const auto& info = graph_.values[value];
  auto& fields = out_.fields[value];
  const bool leaf = info.origin == Origin::parameter || info.origin == Origin::buffer;
  if (leaf && !made_[value] && at::isFloatingType(info.dtype)) {
    const auto rank = static_cast<int64_t>(info.sizes.size());
    out_.roles[value].assign(rank, -1);
    for (int64_t d = 0; d < rank; ++d) {
      if (info.sizes[d] <= 1) {
        continue;
      }
      const auto first = labels_.fresh(info.sizes[d]);
      out_.leaves.push_back({value, d, info.sizes[d], first});
      std::vector<int64_t> shape(rank, 1);
      shape[d] = info.sizes[d];
      Field field;
      field.labels = at::arange(first, first + info.sizes[d], at::kInt).view(shape);
      field.leaf = value;
      field.leaf_dim = d;
      fields.push_back(std::move(field));
    }
  }
  made_[value] = 1;
  Fields current;
  for (auto& field : fields) {
    if (update(labels_, field, one_unit())) {
      current.push_back(field);
    }
  }
  fields = current;
  return current;
}

void Propagator::set(int64_t value, Fields fields) {
  if (value < 0) {
    return;
  }
  Fields kept;
  for (auto& field : fields) {
    if (update(labels_, field, one_unit())) {
      kept.push_back(std::move(field));
    }
  }
  // Copies that an operator made yield to the channels of a parameter where both lie along one dimension.
  for (size_t i = 0; i < kept.size(); ++i) {
    if (!kept[i].weak) {
      continue;
    }
    for (const auto& other : kept) {
      if (!other.weak && overlap(kept[i], other)) {
        pin(labels_, kept[i], reason("copies along a dimension of channels"));
        break;
      }
    }
  }
  std::erase_if(kept, [&](Field& field) { return !update(labels_, field, one_unit()); });
  out_.fields[value] = std::move(kept);
  made_[value] = 1;
}

void Propagator::pin_all(const Fields& fields, int32_t reason) {
  for (const auto& field : fields) {
    pin(labels_, field, reason);
  }
}

Operand Propagator::operand(int64_t value) { return {sizes(value), fields(value), !out_.depends_on_input[value]}; }

Operand Propagator::operand(int64_t value, int64_t rank) {
  Operand out = operand(value);
  while (static_cast<int64_t>(out.sizes.size()) < rank) {
    out.sizes.insert(out.sizes.begin(), 1);
  }
  for (auto& field : out.fields) {
    field = with_rank(field, rank);
  }
  return out;
}

std::vector<int64_t> Propagator::tensors(const Node& node) const {
  std::vector<int64_t> out;
  for (const auto& ids : node.input_values) {
    for (auto id : ids) {
      if (id >= 0) {
        out.push_back(id);
      }
    }
  }
  return out;
}

c10::IValue Propagator::argument(const Node& node, std::string_view name) const {
  const auto handle = c10::Dispatcher::singleton().findSchema(node.op);
  if (handle) {
    const auto& arguments = handle->schema().arguments();
    for (size_t i = 0; i < arguments.size() && i < node.inputs.size(); ++i) {
      if (arguments[i].name() == name) {
        return node.inputs[i];
      }
    }
  }
  return {};
}

void Propagator::set_role(const Field& field, Role role) {
  if (field.leaf < 0) {
    return;
  }
  auto& current = out_.roles[field.leaf][field.leaf_dim];
  if (current < 0 || static_cast<Role>(current) == Role::affine) {
    current = static_cast<int8_t>(role);
  }
}

// --- operators -------------------------------------------------------------------------------------------------------

void Propagator::elementwise(const Node& node) {
  const int64_t result = node.outputs.empty() ? -1 : node.outputs[0];
  const auto inputs = tensors(node);
  if (result < 0 || inputs.empty()) {
    return;
  }
  int64_t out_rank = rank(result);
  for (auto id : inputs) {
    out_rank = std::max(out_rank, rank(id));
  }
  std::vector<Operand> operands;
  for (auto id : inputs) {
    operands.push_back(operand(id, out_rank));
  }
  const bool meets_activation =
      std::any_of(inputs.begin(), inputs.end(), [&](auto id) { return out_.depends_on_input[id]; });
  if (meets_activation) {
    for (const auto& operand : operands) {
      for (const auto& field : operand.fields) {
        set_role(field, Role::affine);
      }
    }
  }
  auto fields = combine(std::move(operands));
  for (auto id : node.outputs) {
    set(id, fields);
  }
}

void Propagator::reduction(const Node& node) {
  const auto result = node.outputs.empty() ? -1 : node.outputs[0];
  const int64_t input = node.input(0);
  if (result < 0 || input < 0) {
    return;
  }
  const int64_t in_rank = rank(input);
  std::vector<int64_t> dims;
  const auto dim = argument(node, "dim");
  if (dim.isInt()) {
    dims.push_back(dim.toInt());
  } else if (dim.isIntList()) {
    dims = dim.toIntVector();
  }
  if (dims.empty()) {
    for (int64_t d = 0; d < in_rank; ++d) {
      dims.push_back(d);
    }
  }
  for (auto& d : dims) {
    d = d < 0 ? d + in_rank : d;
  }
  auto fields = this->fields(input);
  reduce(fields, dims, true);
  std::sort(dims.rbegin(), dims.rend());
  for (auto id : node.outputs) {
    auto mine = fields;
    if (id >= 0 && rank(id) < in_rank) {
      for (auto& field : mine) {
        for (auto d : dims) {
          field.labels = field.labels.squeeze(d);
        }
      }
    }
    set(id, std::move(mine));
  }
}

void Propagator::along(const Node& node) {
  const int64_t input = node.input(0);
  const auto dim_argument = argument(node, "dim");
  if (!dim_argument.isInt()) {
    // max and min: of two tensors, or of everything.
    node.input_values.size() > 1 && node.input(1) >= 0 ? elementwise(node) : reduction(node);
    return;
  }
  const int64_t in_rank = rank(input);
  const int64_t dim = dim_argument.toInt() < 0 ? dim_argument.toInt() + in_rank : dim_argument.toInt();
  auto fields = this->fields(input);
  const bool normalizes = node.op.name.find("softmax") != std::string::npos;
  if (normalizes) {
    // Over what is kept, as the normalizations.
    for (auto& field : fields) {
      if (field.varies(dim) && field.dims().size() > 1) {
        unite_along(labels_, field, {dim});
      }
    }
  } else {
    reduce(fields, {dim}, false);
  }
  for (auto id : node.outputs) {
    auto mine = fields;
    if (id >= 0 && rank(id) < in_rank) {
      for (auto& field : mine) {
        field.labels = field.labels.squeeze(dim);
      }
    }
    set(id, std::move(mine));
  }
}

void Propagator::spatial(const Node& node, int64_t n) {
  const int64_t in_rank = rank(node.input(0));
  std::vector<int64_t> dims;
  for (int64_t d = in_rank - n; d < in_rank; ++d) {
    dims.push_back(d);
  }
  auto fields = this->fields(node.input(0));
  reduce(fields, dims, false);
  for (auto id : node.outputs) {
    set(id, fields);
  }
}

void Propagator::glu(const Node& node) {
  const int64_t in_rank = rank(node.input(0));
  const int64_t given = node.inputs.size() > 1 && node.inputs[1].isInt() ? node.inputs[1].toInt() : -1;
  const int64_t dim = given < 0 ? given + in_rank : given;
  Operand halves[2];
  for (int64_t h = 0; h < 2; ++h) {
    halves[h] = operand(node.input(0));
    const int64_t half = halves[h].sizes[dim] / 2;
    halves[h].sizes[dim] = half;
    for (auto& field : halves[h].fields) {
      if (field.varies(dim)) {
        field.labels = field.labels.narrow(dim, h * half, half);
        field.version = -1;
      }
    }
  }
  set(node.outputs[0], combine({halves[0], halves[1]}));
}

void Propagator::factory(const Node& node) {
  for (auto id : node.outputs) {
    if (id < 0 || !at::isFloatingType(graph_.values[id].dtype)) {
      continue;
    }
    Fields fields;
    for (int64_t d = 0; d < rank(id); ++d) {
      const int64_t size = sizes(id)[d];
      if (size > 1) {
        std::vector<int64_t> shape(rank(id), 1);
        shape[d] = size;
        const auto first = labels_.fresh(size);
        Field field;
        field.labels = at::arange(first, first + size, at::kInt).view(shape);
        field.weak = true;
        fields.push_back(std::move(field));
      }
    }
    set(id, std::move(fields));
  }
}

void Propagator::unknown(const Node& node) {
  const auto why = reason("is not an operator whose channels are understood: what flows through it keeps its shape");
  for (auto id : tensors(node)) {
    pin_all(fields(id), why);
  }
  for (auto id : node.outputs) {
    if (id >= 0) {
      pin_all(fields(id), why);
      set(id, {});
    }
  }
}

void Propagator::embedding(const Node& node) {
  const int64_t weight = node.input(0), result = node.outputs[0];
  Fields out;
  for (auto& field : fields(weight)) {
    if (field.varies(0)) {
      set_role(field, Role::input);
      pin(labels_, field, reason("looks up rows by the model's input"));
    } else {
      set_role(field, Role::output);
      field = with_rank(with_rank(field, 1), rank(result));
      field.leaf = -1;
      out.push_back(std::move(field));
    }
  }
  set(result, std::move(out));
  for (size_t i = 1; i < node.outputs.size(); ++i) {
    set(node.outputs[i], {});
  }
}

void Propagator::visit(int64_t index) {
  const Node& node = graph_.nodes[index];
  current_ = index;
  for (auto id : tensors(node)) {
    if (out_.depends_on_input[id]) {
      for (auto output : node.outputs) {
        if (output >= 0 && graph_.values[output].origin == Origin::intermediate) {
          out_.depends_on_input[output] = 1;
        }
      }
    }
  }
  switch (graph::kind_of(node.op)) {
    case Kind::identity:
    case Kind::like:
      set(node.outputs.at(0), fields(node.input(0)));
      break;
    case Kind::factory:
      factory(node);
      break;
    case Kind::range:
    case Kind::query:
      break;
    case Kind::copy:
    case Kind::elementwise:
      elementwise(node);
      break;
    case Kind::movement:
      movement(node);
      break;
    case Kind::index:
      this->index(node);
      break;
    case Kind::concatenation:
      concatenation(node);
      break;
    case Kind::stacking:
      stacking(node);
      break;
    case Kind::padding:
      padding(node);
      break;
    case Kind::reduction:
      reduction(node);
      break;
    case Kind::along:
      along(node);
      break;
    case Kind::spatial1:
      spatial(node, 1);
      break;
    case Kind::spatial2:
      spatial(node, 2);
      break;
    case Kind::spatial3:
      spatial(node, 3);
      break;
    case Kind::linear:
      linear(node);
      break;
    case Kind::addmm:
    case Kind::baddbmm:
      matmul(node, node.input(1), node.input(2), node.input(0));
      break;
    case Kind::matmul:
      matmul(node, node.input(0), node.input(1), -1);
      break;
    case Kind::convolution:
      convolution(node, false);
      break;
    case Kind::transposed_convolution:
      convolution(node, true);
      break;
    case Kind::general_convolution:
      convolution(node, argument(node, "transposed").toBool());
      break;
    case Kind::attention:
      attention(node);
      break;
    case Kind::batch_norm:
    case Kind::instance_norm:
      channel_norm(node, 1, {node.input(1), node.input(2), node.input(3), node.input(4)});
      break;
    case Kind::prelu:
      channel_norm(node, 1, {node.input(1)});
      break;
    case Kind::layer_norm:
      layer_norm(node, {2, 3});
      break;
    case Kind::rms_norm:
      layer_norm(node, {2});
      break;
    case Kind::group_norm:
      group_norm(node);
      break;
    case Kind::embedding:
      embedding(node);
      break;
    case Kind::glu:
      glu(node);
      break;
    case Kind::recurrent:
      recurrent(node);
      break;
    case Kind::fake_quantize:
      fake_quantize(node);
      break;
    case Kind::weight_norm: {
      auto fields = combine({operand(node.input(0)), operand(node.input(1))});
      set(node.outputs[0], std::move(fields));
      set(node.outputs[1], this->fields(node.input(1)));
      break;
    }
    case Kind::unknown:
      unknown(node);
      break;
  }
}

void Propagator::make_rectangular() {
  for (bool again = true; again;) {
    again = false;
    for (size_t value = 0; value < out_.fields.size(); ++value) {
      for (auto field : fields(static_cast<int64_t>(value))) {
        const auto dims = field.dims();
        if (dims.size() < 2) {
          continue;
        }
        // The dimension along which the most units remain when labels unite along all others.
        int64_t best = dims[0];
        size_t most = 0;
        for (auto kept : dims) {
          Labels trial;
          std::vector<int32_t> names(field.labels.const_data_ptr<int32_t>(),
                                     field.labels.const_data_ptr<int32_t>() + field.labels.numel());
          std::sort(names.begin(), names.end());
          names.erase(std::unique(names.begin(), names.end()), names.end());
          trial.fresh(static_cast<int64_t>(names.size()));
          Field local = field;
          local.labels = field.labels.clone();
          auto* data = local.labels.mutable_data_ptr<int32_t>();
          for (int64_t i = 0; i < local.labels.numel(); ++i) {
            data[i] = static_cast<int32_t>(std::lower_bound(names.begin(), names.end(), data[i]) - names.begin());
          }
          std::vector<int64_t> others;
          std::copy_if(dims.begin(), dims.end(), std::back_inserter(others), [&](int64_t d) { return d != kept; });
          unite_along(trial, local, others);
          std::set<int32_t> units;
          for (int32_t label = 0; label < static_cast<int32_t>(names.size()); ++label) {
            units.insert(trial.find(label));
          }
          if (units.size() > most) {
            most = units.size();
            best = kept;
          }
        }
        std::vector<int64_t> others;
        std::copy_if(dims.begin(), dims.end(), std::back_inserter(others), [&](int64_t d) { return d != best; });
        unite_along(labels_, field, others);
        again = true;
      }
    }
  }
}

void Propagator::run(const Pins& pins) {
  const at::NoGradGuard no_grad;
  for (const auto& [tensor, why] : pins.tensors) {
    current_ = -1;
    const auto value = graph_.find(tensor);
    if (value >= 0) {
      pin_all(fields(value), labels_.add_reason(-1, why));
    }
  }
  for (auto index : graph_.schedule) {
    visit(index);
    for (const auto& [node, why] : pins.nodes) {
      if (node == index) {
        const auto pin_reason = reason(why);
        for (auto id : tensors(graph_.nodes[index])) {
          pin_all(fields(id), pin_reason);
        }
        for (auto id : graph_.nodes[index].outputs) {
          pin_all(fields(id), pin_reason);
        }
      }
    }
  }
  current_ = -1;
  const auto output_reason = labels_.add_reason(-1, "the model returns it");
  for (auto id : graph_.outputs) {
    pin_all(fields(id), output_reason);
  }
  make_rectangular();
}

}  // namespace rarefy::pruning
