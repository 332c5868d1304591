#include "onnx/translate.h"

#include <ATen/ops/equal.h>
#include <c10/util/Exception.h>
#include <fmt/format.h>
#include <fmt/ranges.h>
#include <rarefy/ops/fake_quantize.h>

#include <algorithm>
#include <set>

#include "graph/call.h"

namespace rarefy::onnx {
namespace {

/// Facts about a tensor that the model's code asks for and that no number of the tensor changes.
bool asks_for_a_fact(const graph::Node& node) {
  std::string_view name = node.op.name;
  if (name == "aten::equal" && node.input(0) == node.input(1)) {
    return true;  // torch's attention asks whether keys are queries
  }
  static const std::set<std::string_view> names = {"size",
                                                   "stride",
                                                   "sym_size",
                                                   "sym_numel",
                                                   "sym_stride",
                                                   "sym_storage_offset",
                                                   "dim",
                                                   "numel",
                                                   "is_floating_point",
                                                   "is_complex",
                                                   "is_contiguous",
                                                   "is_inference",
                                                   "is_same_size",
                                                   "result_type",
                                                   "can_cast",
                                                   "_has_compatible_shallow_copy_type",
                                                   "_assert_tensor_metadata",
                                                   "_assert_async"};
  return name.starts_with("aten::") && names.contains(name.substr(6));
}

std::string folder(const std::string& name) {
  const auto dot = name.rfind('.');
  return dot == std::string::npos ? "" : name.substr(0, dot);
}

/// "fc1" of "fc1.quant.weight".
std::string layer_of(const std::string& module) { return module.substr(0, module.find(".quant.")); }

}  // namespace

const Rule* find_rule(const c10::OperatorName& op) {
  static const Rules rules = [] {
    Rules table;
    add_bag_rules(table);
    add_elementwise_rules(table);
    add_movement_rules(table);
    add_layer_rules(table);
    add_quantization_rules(table);
    add_format_rules(table);
    add_converted_rules(table);
    add_packed_rules(table);
    return table;
  }();
  std::string_view name = op.name;
  if (op.overload_name == "out" || op.overload_name.ends_with("_out")) {
    return nullptr;
  }
  if (name.starts_with("aten::")) {
    name.remove_prefix(6);
  }
  auto found = rules.find(name);
  if (found == rules.end() && name.ends_with('_')) {
    found = rules.find(name.substr(0, name.size() - 1));
  }
  return found == rules.end() ? nullptr : &found->second;
}

Translator::Translator(const Recording& recording, TranslateOptions options)
    : recording_(recording), options_(std::move(options)) {
  for (size_t i = 0; i < graph().nodes.size(); ++i) {
    for (auto id : graph().nodes[i].outputs) {
      if (id >= 0) {
        makers_.try_emplace(id, static_cast<int64_t>(i));
      }
    }
  }
}

void Translator::refuse(const std::string& why) const {
  TORCH_CHECK_VALUE(false, "[export_onnx] ", describe(*current_), ": ", why);
}

/// "aten::conv2d (layer1.conv)"; where no parameter tells the module, the one before it.
std::string Translator::describe(const graph::Node& node) const {
  if (const auto module = layer_of(module_of(node)); !module.empty()) {
    return fmt::format("{} ({})", node.op.name, module);
  }
  for (auto index = static_cast<int64_t>(&node - graph().nodes.data()); index-- > 0;) {
    if (const auto module = layer_of(module_of(graph().nodes[index])); !module.empty()) {
      return fmt::format("{} (after {})", node.op.name, module);
    }
  }
  return node.op.name;
}

/// The module that the first parameter or buffer among what a constant was computed from belongs to.
std::string Translator::owner(int64_t id) const {
  std::vector<int64_t> waiting{id};
  std::set<int64_t> seen;
  while (!waiting.empty()) {
    const auto current = waiting.back();
    waiting.pop_back();
    if (current < 0 || !seen.insert(current).second) {
      continue;
    }
    if (const auto& name = graph().values[current].name; !name.empty()) {
      return layer_of(folder(name));
    }
    if (const auto* made_by = maker(current)) {
      const auto& inputs = made_by->input_values;
      for (auto argument = inputs.rbegin(); argument != inputs.rend(); ++argument) {
        waiting.insert(waiting.end(), argument->rbegin(), argument->rend());
      }
    }
  }
  return "";
}

std::string Translator::module_of(const graph::Node& node) const {
  if (node.op.name == "rarefy::fake_quantize") {
    return folder(graph().values[node.input(1)].name);
  }
  if (rounds_to_format(node) && node.input_values.size() > 1 && node.input(1) >= 0) {
    if (const auto module = folder(graph().values[node.input(1)].name); !module.empty()) {
      return module;
    }
  }
  if (!node.module.empty()) {
    return node.module;
  }
  for (const auto& argument : node.input_values) {
    for (auto id : argument) {
      const bool is_constant = id >= 0 && graph().values[id].origin != graph::Origin::intermediate &&
                               graph().values[id].origin != graph::Origin::input;
      if (is_constant) {
        if (auto module = owner(id); !module.empty()) {
          return module;
        }
      }
    }
  }
  if (node.op.name == "rarefy::reduce_bags") {  // of the table that its rows come from
    for (const auto* made_by = maker(node.input(0)); made_by != nullptr; made_by = maker(made_by->input(0))) {
      if (auto module = layer_of(module_of(*made_by)); !module.empty()) {
        return module;
      }
    }
  }
  // An operation without weights quantizes its inputs itself.
  for (const auto& argument : node.input_values) {
    for (auto id : argument) {
      const auto* made_by = id < 0 ? nullptr : maker(id);
      if (made_by != nullptr && made_by->op.name == "rarefy::fake_quantize") {
        const auto module = module_of(*made_by);
        if (module.ends_with(".quant.input0") || module.ends_with(".quant.input1")) {
          return layer_of(module);
        }
      }
    }
  }
  return "";
}

std::string Translator::name_here(std::string_view what) const {
  return module_.empty() ? std::string(what) : fmt::format("{}/{}", module_, what);
}

const graph::Node* Translator::maker(int64_t id) const {
  const auto found = makers_.find(id);
  return found == makers_.end() ? nullptr : &graph().nodes[found->second];
}

Shape Translator::shape_of(int64_t id) const {
  const auto& sizes = graph().values[id].sizes;
  auto shape = fixed(sizes);
  const auto fits = [&](size_t i, const Dim& dim) {
    return std::all_of(recording_.others.begin(), recording_.others.end(), [&](const Recording::Run& run) {
      return run.graph.values[id].sizes[i] == (dim.is_fixed() ? dim.size : dim.per_batch * run.batch);
    });
  };
  for (size_t i = 0; i < sizes.size(); ++i) {
    for (const int64_t per_batch : {int64_t{0}, recording_.batch > 0 ? sizes[i] / recording_.batch : 0, int64_t{-1}}) {
      shape[i].per_batch = per_batch;
      if (fits(i, shape[i])) {
        break;
      }
    }
  }
  return shape;
}

Value* Translator::value(int64_t id, std::string_view role) {
  if (const auto known = values_.find(id); known != values_.end()) {
    return known->second;
  }
  const auto& recorded = graph().values[id];
  if (!recorded.tensor.defined() || recorded.origin == graph::Origin::intermediate) {
    refuse(fmt::format("argument '{}' must come from an operator that was recorded", role));
  }
  const auto shape = shape_of(id);
  Value* result = nullptr;
  if (!std::all_of(shape.begin(), shape.end(), [](const Dim& dim) { return dim.is_fixed(); })) {
    result = batch_constant(id, role);
  } else if (const auto weight = integers(id)) {
    result = this->weight(*weight, role);
  } else if (const auto parts = stored(id)) {
    result = this->weight(*parts, /*transposed=*/false, role);
  } else {
    result =
        recorded.name.empty() ? constant(recorded.tensor, role) : model_.add_constant(recorded.name, recorded.tensor);
  }
  values_[id] = result;
  return result;
}

/// A constant that has a size of the batch: the same row for each sample.
Value* Translator::batch_constant(int64_t id, std::string_view role) {
  const auto& tensor = graph().values[id].tensor;
  auto row = tensor;
  const auto shape = shape_of(id);
  for (size_t i = 0; i < shape.size(); ++i) {
    if (!shape[i].is_fixed()) {
      row = row.narrow(static_cast<int64_t>(i), 0, 1);
    }
  }
  const auto repeats = [&](const at::Tensor& rows) { return at::equal(row.expand(rows.sizes()), rows); };
  if (!repeats(tensor) || !std::all_of(recording_.others.begin(), recording_.others.end(),
                                       [&](const auto& run) { return repeats(run.graph.values[id].tensor); })) {
    refuse(fmt::format("argument '{}' has values that depend on the size of the batch (dynamic_batch = false fixes it)",
                       role));
  }
  auto* source = constant(row, role);
  return emit("Expand", {source, shape_value(shape)});
}

std::optional<IntegerTensor> Translator::integers(int64_t id) const {
  const auto* made_by = maker(id);
  if (graph().values[id].origin != graph::Origin::constant || made_by == nullptr) {
    return std::nullopt;
  }
  if (made_by->op.name != "rarefy::fake_quantize") {
    return scaled_rows(*this, *made_by);
  }
  const auto& node = *made_by;
  const auto scale = graph().values[node.input(1)].tensor, zero_point = graph().values[node.input(2)].tensor;
  if (!scale.defined() || !zero_point.defined()) {
    return std::nullopt;
  }
  const auto axis = node.inputs[3].toOptional<int64_t>();
  const auto qmin = node.inputs[4].toInt(), qmax = node.inputs[5].toInt();
  if (qmax - qmin > 255) {
    return std::nullopt;  // stored() has them
  }
  // What is on the grid stays where it is: quantizing it again gives the integers that it was made of.
  const auto values = ops::quantize(graph().values[id].tensor, scale, zero_point, axis, qmin, qmax);
  const auto of_type = zero_point.to(values.scalar_type());
  return IntegerTensor{values,
                       {axis ? scale : scale.reshape({}), axis ? of_type : of_type.reshape({}), axis, qmin, qmax}};
}

Value* Translator::transposed(int64_t id, std::string_view role) {
  auto& result = transposed_[id];
  if (result == nullptr) {
    if (auto weight = integers(id)) {
      const auto rank = weight->values.dim();
      weight->values = weight->values.transpose(-2, -1);
      if (weight->grid.axis.has_value() && *weight->grid.axis >= rank - 2) {
        weight->grid.axis = *weight->grid.axis == rank - 2 ? rank - 1 : rank - 2;
      }
      result = this->weight(*weight, role);
    } else if (const auto parts = stored(id); parts.has_value() && parts->shape.size() == 2) {
      result = this->weight(*parts, /*transposed=*/true, role);
    } else {
      const auto& recorded = graph().values[id];
      result = model_.add_constant(recorded.name.empty() ? name_here(role) : recorded.name,
                                   recorded.tensor.transpose(-2, -1));
    }
  }
  return result;
}

/// Whether the operator gave back what it was given, unchanged.
bool Translator::is_passed_on(const graph::Node& node) const {
  const auto& schema = graph::schema_of(node);
  for (size_t i = 0; i < node.input_values.size(); ++i) {
    if (graph::writes_argument(schema, i)) {
      return false;
    }
  }
  return std::all_of(node.outputs.begin(), node.outputs.end(), [&](int64_t id) {
    return std::any_of(node.input_values.begin(), node.input_values.end(), [&](const auto& argument) {
      return std::find(argument.begin(), argument.end(), id) != argument.end();
    });
  });
}

void Translator::check_rules() const {
  std::vector<std::string> missing;
  for (auto index : graph().schedule) {
    const auto& node = graph().nodes[index];
    if (asks_for_a_fact(node) || (!node.outputs.empty() && is_passed_on(node)) || find_rule(node.op) != nullptr) {
      continue;
    }
    const auto text = describe(node);
    if (std::find(missing.begin(), missing.end(), text) == missing.end()) {
      missing.push_back(text);
    }
  }
  TORCH_CHECK_VALUE(missing.empty(), "[export_onnx] every operator must have a form in ONNX that is known here, but ",
                    fmt::format("{}", fmt::join(missing, ", ")), missing.size() == 1 ? " has none" : " have none");
}

Model Translator::run() {
  check_rules();
  for (size_t i = 0; i < graph().inputs.size(); ++i) {
    const auto id = graph().inputs[i];
    values_[id] = model_.add_input(options_.input_names.at(i), graph().values[id].dtype, shape_of(id));
  }
  const auto& schedule = graph().schedule;
  for (size_t place = 0; place < schedule.size(); ++place) {
    run_node(graph().nodes[schedule[place]], place);
  }
  for (auto id : graph().outputs) {
    module_.clear();
    model_.outputs.push_back(value(id, "output"));
  }
  model_.output_names = options_.output_names;
  return std::move(model_);
}

void Translator::run_node(const graph::Node& node, size_t place) {
  if (asks_for_a_fact(node) || (!node.outputs.empty() && is_passed_on(node))) {
    return;
  }
  current_ = &node;
  module_ = module_of(node);
  std::vector<const graph::Node*> others;
  for (const auto& run : recording_.others) {
    others.push_back(&run.graph.nodes[graph().schedule[place]]);
  }
  const auto results = (*find_rule(node.op))(Call(*this, node, std::move(others)));
  const auto& schema = graph::schema_of(node);
  bool written = false;
  for (size_t i = 0; i < node.input_values.size(); ++i) {
    if (!graph::writes_argument(schema, i)) {
      continue;
    }
    if (i > 0 || node.input(0) < 0) {
      refuse("an operator may change its first argument in place, and no other");
    }
    written = true;
  }
  if (written) {
    check_views(node.input(0), place);
    set(node.input(0), results.at(0));
    return;
  }
  for (size_t i = 0; i < node.outputs.size(); ++i) {
    if (node.outputs[i] >= 0 && i < results.size()) {
      set(node.outputs[i], results[i]);
    }
  }
}

/// An ONNX value never changes: what lies in the same memory as one that is written must not be read afterwards.
void Translator::check_views(int64_t written, size_t place) const {
  const auto& schedule = graph().schedule;
  const auto shares = [&](int64_t id) {
    return id >= 0 && id != written && values_.contains(id) &&
           graph().values[id].memory == graph().values[written].memory;
  };
  bool seen = std::any_of(graph().outputs.begin(), graph().outputs.end(), shares);
  for (size_t later = place + 1; later < schedule.size() && !seen; ++later) {
    for (const auto& argument : graph().nodes[schedule[later]].input_values) {
      seen = seen || std::any_of(argument.begin(), argument.end(), shares);
    }
  }
  if (seen) {
    refuse("a tensor that is changed in place must not be read through another view of it afterwards");
  }
}

void Translator::set(int64_t id, Value* value) {
  const auto dtype = graph().values[id].dtype;
  if (value->dtype != dtype) {
    refuse(fmt::format("its result must have a type that ONNX gives it too, got {} and {}", c10::toString(dtype),
                       c10::toString(value->dtype)));
  }
  if (value->producer != nullptr && !value->has_shape) {
    value->shape = shape_of(id);
    value->has_shape = true;
  }
  values_[id] = value;
}

}  // namespace rarefy::onnx
