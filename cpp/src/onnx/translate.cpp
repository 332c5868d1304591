#include "onnx/translate.h"

#include <ATen/ops/equal.h>
#include <ATen/ops/full.h>
#include <ATen/ops/tensor.h>
#include <c10/util/Exception.h>
#include <fmt/format.h>
#include <fmt/ranges.h>
#include <rarefy/ops/fake_quantize.h>

#include <algorithm>
#include <limits>
#include <set>

#include "graph/call.h"
#include "onnx/file.h"

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

const graph::Node* node_at(const std::optional<graph::Graph>& graph, int64_t index) {
  return graph.has_value() ? &graph->nodes[index] : nullptr;
}

}  // namespace

const Rule* find_rule(const c10::OperatorName& op) {
  static const Rules rules = [] {
    Rules table;
    add_elementwise_rules(table);
    add_movement_rules(table);
    add_layer_rules(table);
    add_quantization_rules(table);
    add_converted_rules(table);
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

// ---- Call -----------------------------------------------------------------------------------------------------------

std::optional<size_t> Call::find(std::string_view name) const { return graph::argument_index(node_, name); }

int64_t Call::id_of(std::string_view name) const {
  const auto index = find(name);
  return index ? node_.input(*index) : -1;
}

const c10::IValue& Call::literal(std::string_view name) const {
  static const c10::IValue none;
  const auto index = find(name);
  if (!index) {
    return none;
  }
  const auto& value = node_.inputs[*index];
  if (other_ != nullptr && !(value == other_->inputs[*index])) {
    refuse(
        fmt::format("argument '{}' must not depend on the size of the batch (dynamic_batch = false fixes it)", name));
  }
  return value;
}

bool Call::has(std::string_view name) const {
  const auto index = find(name);
  return index && (node_.input(*index) >= 0 || node_.input_values[*index].size() > 1 || !node_.inputs[*index].isNone());
}

Value* Call::tensor(std::string_view name) const {
  const auto id = id_of(name);
  if (id < 0) {
    refuse(fmt::format("argument '{}' must be a tensor", name));
  }
  return t.value(id, name);
}

Value* Call::optional_tensor(std::string_view name) const { return id_of(name) < 0 ? nullptr : tensor(name); }

std::vector<Value*> Call::tensors(std::string_view name) const {
  std::vector<Value*> out;
  if (const auto index = find(name)) {
    for (auto id : node_.input_values[*index]) {
      out.push_back(id < 0 ? nullptr : t.value(id, name));
    }
  }
  return out;
}

at::Tensor Call::constant(std::string_view name) const {
  const auto id = id_of(name);
  if (id < 0 || t.graph().values[id].origin == graph::Origin::intermediate ||
      t.graph().values[id].origin == graph::Origin::input) {
    return {};
  }
  for (const auto& dim : t.shape_of(id)) {
    if (!dim.is_fixed()) {
      return {};
    }
  }
  return t.graph().values[id].tensor;
}

Value* Call::transposed_weight(std::string_view name) const {
  return constant(name).defined() ? t.transposed(id_of(name), name) : nullptr;
}

int64_t Call::integer(std::string_view name) const { return literal(name).toInt(); }
double Call::number(std::string_view name) const { return literal(name).toScalar().toDouble(); }
bool Call::flag(std::string_view name) const { return literal(name).toBool(); }
std::string Call::text(std::string_view name) const {
  return literal(name).isString() ? literal(name).toStringRef() : "";
}

std::vector<int64_t> Call::integers(std::string_view name, size_t count) const {
  const auto& value = literal(name);
  auto out = value.isNone() ? std::vector<int64_t>() : value.isInt() ? std::vector{value.toInt()} : value.toIntVector();
  if (out.size() == 1 && count > 1) {
    out.assign(count, out[0]);
  }
  return out;
}

Shape Call::shape_of(std::string_view name) const { return t.shape_of(id_of(name)); }
at::ScalarType Call::dtype_of(std::string_view name) const { return t.graph().values[id_of(name)].dtype; }
Shape Call::result_shape(size_t i) const {
  return t.shape_of(node_.outputs.empty() ? node_.input(0) : node_.outputs.at(i));
}
at::ScalarType Call::result_dtype() const {
  return t.graph().values[node_.outputs.empty() ? node_.input(0) : node_.outputs[0]].dtype;
}

int64_t Call::dimension(std::string_view name, int64_t rank) const {
  const auto dim = integer(name);
  return dim < 0 ? dim + rank : dim;
}

void Call::refuse(const std::string& why) const { t.refuse(why); }

// ---- Translator -----------------------------------------------------------------------------------------------------

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
  if (recording_.other.has_value()) {
    const auto& more = recording_.other->values[id].sizes;
    for (size_t i = 0; i < sizes.size(); ++i) {
      if (const auto step = more[i] - sizes[i]; step != 0) {
        shape[i].per_batch = step * recording_.batch == sizes[i] ? step : -1;
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
  const auto& more = recording_.other->values[id].tensor;
  auto row = tensor;
  const auto shape = shape_of(id);
  for (size_t i = 0; i < shape.size(); ++i) {
    if (!shape[i].is_fixed()) {
      row = row.narrow(static_cast<int64_t>(i), 0, 1);
    }
  }
  if (!at::equal(row.expand(tensor.sizes()), tensor) || !at::equal(row.expand(more.sizes()), more)) {
    refuse(fmt::format("argument '{}' has values that depend on the size of the batch (dynamic_batch = false fixes it)",
                       role));
  }
  auto* source = constant(row, role);
  return emit("Expand", {source, shape_value(shape)});
}

std::optional<IntegerTensor> Translator::integers(int64_t id) const {
  const auto* made_by = maker(id);
  if (graph().values[id].origin != graph::Origin::constant || made_by == nullptr ||
      made_by->op.name != "rarefy::fake_quantize") {
    return std::nullopt;
  }
  const auto& node = *made_by;
  const auto scale = graph().values[node.input(1)].tensor, zero_point = graph().values[node.input(2)].tensor;
  if (!scale.defined() || !zero_point.defined()) {
    return std::nullopt;
  }
  const auto axis = node.inputs[3].toOptional<int64_t>();
  const auto qmin = node.inputs[4].toInt(), qmax = node.inputs[5].toInt();
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
    } else {
      const auto& recorded = graph().values[id];
      result = model_.add_constant(recorded.name.empty() ? name_here(role) : recorded.name,
                                   recorded.tensor.transpose(-2, -1));
    }
  }
  return result;
}

Value* Translator::emit(const std::string& op, std::vector<Value*> inputs, Attributes attributes,
                        std::optional<at::ScalarType> dtype) {
  const auto type = dtype.value_or(inputs.empty() ? at::kFloat : inputs[0]->dtype);
  return model_.add_node(name_here(op), op, std::move(inputs), std::move(attributes), type)->outputs[0];
}

std::vector<Value*> Translator::emit_several(size_t count, const std::string& op, std::vector<Value*> inputs,
                                             Attributes attributes) {
  const auto type = inputs.at(0)->dtype;
  return model_.add_node(name_here(op), op, std::move(inputs), std::move(attributes), type, count)->outputs;
}

Value* Translator::integers(const std::vector<int64_t>& values) {
  const auto name = fmt::format("int64[{}]", fmt::join(values, ","));
  auto& known = small_[name];
  if (known == nullptr) {
    known = model_.add_constant(name, at::tensor(values, at::kLong));
  }
  return known;
}

Value* Translator::scalar(double number, at::ScalarType dtype) {
  const auto name = fmt::format("{}({})", c10::toString(dtype), number);
  auto& known = small_[name];
  if (known == nullptr) {
    known = model_.add_constant(name, at::full({}, number, at::TensorOptions().dtype(dtype)));
  }
  return known;
}

Value* Translator::constant(const at::Tensor& tensor, std::string_view role) {
  return model_.add_constant(module_.empty() ? std::string(role) : fmt::format("{}.{}", module_, role), tensor);
}

Value* Translator::cast(Value* x, at::ScalarType dtype) {
  if (x->dtype == dtype) {
    return x;
  }
  if (x->constant.defined()) {
    return model_.add_constant(x->name, x->constant.to(dtype));
  }
  return emit("Cast", {x}, {{"to", type_number(dtype)}}, dtype);
}

/// The size of the batch as int64 [1]: that of the first input's first dimension.
Value* Translator::batch() {
  if (batch_ == nullptr) {
    auto* sizes = model_.add_node("batch/Shape", "Shape", {model_.inputs.at(0)}, {}, at::kLong)->outputs[0];
    batch_ = model_.add_node("batch/Gather", "Gather", {sizes, integers(std::vector<int64_t>{0})}, {}, at::kLong)
                 ->outputs[0];
  }
  return batch_;
}

Value* Translator::shape_value(const Shape& shape) {
  std::vector<Value*> pieces;
  std::vector<int64_t> numbers;
  const auto flush = [&] {
    if (!numbers.empty()) {
      pieces.push_back(integers(std::exchange(numbers, {})));
    }
  };
  for (const auto& dim : shape) {
    if (dim.is_fixed()) {
      numbers.push_back(dim.size);
      continue;
    }
    if (dim.per_batch < 0) {
      refuse("a size must be fixed or a multiple of the batch (dynamic_batch = false fixes it)");
    }
    flush();
    pieces.push_back(dim.per_batch == 1 ? batch()
                                        : emit("Mul", {batch(), integers(std::vector<int64_t>{dim.per_batch})}));
  }
  flush();
  if (pieces.empty()) {
    return integers(std::vector<int64_t>{});
  }
  return pieces.size() == 1 ? pieces[0] : emit("Concat", pieces, {{"axis", int64_t{0}}});
}

Value* Translator::reshape(Value* x, const Shape& shape) {
  const auto following = std::count_if(shape.begin(), shape.end(), [](const Dim& dim) { return !dim.is_fixed(); });
  if (std::any_of(shape.begin(), shape.end(), [](const Dim& dim) { return dim.size == 0; })) {
    refuse("a tensor without elements cannot be reshaped");
  }
  Value* sizes = nullptr;
  if (following <= 1) {  // which works for sizes that are no multiple of the batch too
    std::vector<int64_t> numbers;
    for (const auto& dim : shape) {
      numbers.push_back(dim.is_fixed() ? dim.size : -1);
    }
    sizes = integers(numbers);
  } else {
    sizes = shape_value(shape);
  }
  auto* result = emit("Reshape", {x, sizes});
  result->shape = shape;
  result->has_shape = true;
  return result;
}

Value* Translator::weight(const IntegerTensor& weight, std::string_view role) {
  auto* values = constant(weight.values, role);
  auto* scale = constant(weight.grid.scale, fmt::format("{}_scale", role));
  std::vector<Value*> inputs{values, scale};
  if (options_.weight_zero_points) {
    inputs.push_back(constant(weight.grid.zero_point, fmt::format("{}_zero_point", role)));
  }
  Attributes attributes;
  if (weight.grid.axis.has_value()) {
    attributes.emplace_back("axis", *weight.grid.axis);
  }
  auto* result = emit("DequantizeLinear", inputs, attributes, weight.grid.scale.scalar_type());
  result->shape = fixed(weight.values.sizes());
  result->has_shape = true;
  return result;
}

Grid Translator::as_written(Grid grid) const {
  const bool wide = grid.zero_point.element_size() > 1;
  if (wide && opset() < 21) {
    refuse("activations of 16 bits need operator set 21");
  }
  if (options_.unsigned_activations && at::isSignedType(grid.zero_point.scalar_type())) {
    const int64_t middle = wide ? 32768 : 128;
    grid.zero_point = (grid.zero_point.to(at::kInt) + middle).to(wide ? at::kUInt16 : at::kByte);
    grid.qmin += middle;
    grid.qmax += middle;
  }
  return grid;
}

namespace {

Attributes axis_of(const Grid& grid) { return grid.axis.has_value() ? Attributes{{"axis", *grid.axis}} : Attributes{}; }

Value* shaped_like(Value* y, const Value* x) {
  y->shape = x->shape;
  y->has_shape = x->has_shape;
  return y;
}

}  // namespace

Value* Translator::quantize(Value* x, const Grid& grid) {
  const auto type = grid.zero_point.scalar_type();
  auto *scale = constant(grid.scale, "scale"), *zero_point = constant(grid.zero_point, "zero_point");
  auto* q = shaped_like(emit("QuantizeLinear", {x, scale, zero_point}, axis_of(grid), type), x);
  const int64_t levels = grid.zero_point.element_size() > 1 ? 65536 : 256;
  const int64_t lowest = at::isSignedType(type) ? -levels / 2 : 0;
  if (grid.qmin == lowest && grid.qmax == lowest + levels - 1) {
    return q;
  }
  // The operator saturates at the limits of the type only.
  const auto limit = [&](int64_t value, const char* role) {
    return constant(at::full({}, value, at::kLong).to(type), role);
  };
  return shaped_like(emit("Clip", {q, limit(grid.qmin, "qmin"), limit(grid.qmax, "qmax")}), x);
}

Value* Translator::dequantize(Value* q, const Grid& grid) {
  auto *scale = constant(grid.scale, "scale"), *zero_point = constant(grid.zero_point, "zero_point");
  const auto type = grid.scale.scalar_type();
  return shaped_like(emit("DequantizeLinear", {q, scale, zero_point}, axis_of(grid), type), q);
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
    run_node(graph().nodes[schedule[place]], node_at(recording_.other, schedule[place]), place);
  }
  for (auto id : graph().outputs) {
    module_.clear();
    model_.outputs.push_back(value(id, "output"));
  }
  model_.output_names = options_.output_names;
  return std::move(model_);
}

void Translator::run_node(const graph::Node& node, const graph::Node* other, size_t place) {
  if (asks_for_a_fact(node) || (!node.outputs.empty() && is_passed_on(node))) {
    return;
  }
  current_ = &node;
  module_ = module_of(node);
  const auto results = (*find_rule(node.op))(Call(*this, node, other));
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
