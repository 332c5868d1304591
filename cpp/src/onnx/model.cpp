#include "onnx/model.h"

#include <c10/util/Exception.h>

#include <algorithm>
#include <unordered_set>

namespace rarefy::onnx {

Shape fixed(at::IntArrayRef sizes) {
  Shape shape;
  for (auto size : sizes) {
    shape.push_back({size, 0});
  }
  return shape;
}

int64_t Node::integer(std::string_view attribute, int64_t otherwise) const {
  for (const auto& [key, value] : attributes) {
    if (key == attribute) {
      return std::get<int64_t>(value);
    }
  }
  return otherwise;
}

std::string Model::unique(const std::string& name) {
  auto& count = names_[name];
  std::string result = name;
  while (count > 0 && names_.contains(result = name + "_" + std::to_string(count + 1))) {
    ++count;
  }
  ++count;
  names_.try_emplace(result, 1);
  return result;
}

Value* Model::add_value(const std::string& name, at::ScalarType dtype) {
  auto& value = values_.emplace_back();
  value.name = unique(name);
  value.dtype = dtype;
  return &value;
}

Value* Model::add_input(const std::string& name, at::ScalarType dtype, Shape shape) {
  auto* value = add_value(name, dtype);
  value->shape = std::move(shape);
  value->has_shape = true;
  inputs.push_back(value);
  return value;
}

Value* Model::add_constant(const std::string& name, const at::Tensor& tensor) {
  auto* value = add_value(name, tensor.scalar_type());
  value->constant = tensor.detach().cpu().resolve_conj().resolve_neg().contiguous();
  value->shape = fixed(tensor.sizes());
  value->has_shape = true;
  return value;
}

Node* Model::add_node(const std::string& name, const std::string& op, std::vector<Value*> node_inputs,
                      Attributes attributes, at::ScalarType dtype, size_t count, const Node* before) {
  auto node = std::make_unique<Node>();
  auto* raw = node.get();
  raw->op = op;
  raw->attributes = std::move(attributes);
  raw->inputs = std::move(node_inputs);
  for (auto* value : raw->inputs) {
    if (value != nullptr) {
      value->consumers.push_back(raw);
    }
  }
  for (size_t i = 0; i < count; ++i) {
    auto* value = add_value(name, dtype);
    value->producer = raw;
    raw->outputs.push_back(value);
  }
  raw->name = raw->outputs[0]->name;
  places_[raw] = nodes_.insert(before == nullptr ? nodes_.end() : places_.at(before), std::move(node));
  return raw;
}

void Model::set_input(Node* node, size_t i, Value* value) {
  if (auto* old = node->inputs.at(i); old != nullptr) {
    old->consumers.erase(std::find(old->consumers.begin(), old->consumers.end(), node));
  }
  node->inputs[i] = value;
  value->consumers.push_back(node);
}

void Model::replace(Value* old, Value* value) {
  const auto readers = old->consumers;
  for (auto* reader : readers) {
    for (size_t i = 0; i < reader->inputs.size(); ++i) {
      if (reader->inputs[i] == old) {
        set_input(reader, i, value);
      }
    }
  }
  std::replace(outputs.begin(), outputs.end(), old, value);
}

void Model::remove(Node* node) {
  for (auto* value : node->outputs) {
    TORCH_INTERNAL_ASSERT(value->consumers.empty() && !is_output(value), "a node that is removed must not be read");
  }
  for (auto* value : node->inputs) {
    if (value != nullptr) {
      value->consumers.erase(std::find(value->consumers.begin(), value->consumers.end(), node));
    }
  }
  node->inputs.clear();
  node->removed = true;
  const auto place = places_.find(node);
  removed_.push_back(std::move(*place->second));
  nodes_.erase(place->second);
  places_.erase(place);
}

bool Model::is_output(const Value* value) const {
  return std::find(outputs.begin(), outputs.end(), value) != outputs.end();
}

void Model::remove_unused() {
  std::vector<Node*> all;
  for (const auto& node : nodes_) {
    all.push_back(node.get());
  }
  for (auto node = all.rbegin(); node != all.rend(); ++node) {
    if (std::all_of((*node)->outputs.begin(), (*node)->outputs.end(),
                    [&](const Value* value) { return value->consumers.empty() && !is_output(value); })) {
      remove(*node);
    }
  }
}

std::vector<Node*> Model::nodes(const std::vector<std::string_view>& ops) const {
  std::vector<Node*> out;
  for (const auto& node : nodes_) {
    if (std::find(ops.begin(), ops.end(), node->op) != ops.end()) {
      out.push_back(node.get());
    }
  }
  return out;
}

std::vector<const Value*> Model::constants() const {
  std::vector<const Value*> out;
  for (const auto& value : values_) {
    if (value.constant.defined() && (!value.consumers.empty() || is_output(&value))) {
      out.push_back(&value);
    }
  }
  return out;
}

void Model::name_outputs() {
  std::unordered_set<const Value*> seen;
  for (size_t i = 0; i < outputs.size(); ++i) {
    if (outputs[i]->producer == nullptr || !seen.insert(outputs[i]).second) {
      auto* copy = add_node("Identity", "Identity", {outputs[i]}, {}, outputs[i]->dtype)->outputs[0];
      copy->shape = outputs[i]->shape;
      copy->has_shape = outputs[i]->has_shape;
      outputs[i] = copy;
      seen.insert(copy);
    }
  }
  for (size_t i = 0; i < outputs.size(); ++i) {
    // Who has the name by chance gets another one.
    for (auto& value : values_) {
      if (value.name == output_names[i]) {
        value.name = unique(output_names[i]);
      }
    }
    outputs[i]->name = output_names[i];
    ++names_[output_names[i]];
  }
}

void Model::check() const {
  std::unordered_set<const Value*> made;
  std::unordered_set<std::string> names;
  const auto make = [&](const Value* value) {
    made.insert(value);
    TORCH_INTERNAL_ASSERT(names.insert(value->name).second, "two values are called ", value->name);
  };
  for (const auto* value : inputs) {
    make(value);
  }
  for (const auto* value : constants()) {
    make(value);
  }
  for (const auto& node : nodes_) {
    for (const auto* value : node->inputs) {
      TORCH_INTERNAL_ASSERT(value == nullptr || made.contains(value), node->name, " reads ", value->name,
                            " before it is made");
    }
    for (const auto* value : node->outputs) {
      make(value);
    }
  }
  for (const auto* value : outputs) {
    TORCH_INTERNAL_ASSERT(made.contains(value), "nothing makes output ", value->name);
  }
}

}  // namespace rarefy::onnx
