// The arguments of a recorded operator, as the rules read them.
#include "graph/call.h"

#include <fmt/format.h>

#include <algorithm>

#include "onnx/translate.h"

namespace rarefy::onnx {

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
  const bool equal = std::all_of(others_.begin(), others_.end(),
                                 [&](const graph::Node* other) { return value == other->inputs[*index]; });
  if (!equal) {
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

bool Call::keeps_shape_of(std::string_view name) const {
  const auto id = id_of(name), result = node_.outputs.empty() ? node_.input(0) : node_.outputs[0];
  const auto equal = [&](const graph::Graph& graph) { return graph.values[id].sizes == graph.values[result].sizes; };
  const auto& others = t.recording().others;
  return equal(t.graph()) &&
         std::all_of(others.begin(), others.end(), [&](const Recording::Run& run) { return equal(run.graph); });
}

int64_t Call::dimension(std::string_view name, int64_t rank) const {
  const auto dim = integer(name);
  return dim < 0 ? dim + rank : dim;
}

void Call::refuse(const std::string& why) const { t.refuse(why); }

}  // namespace rarefy::onnx
