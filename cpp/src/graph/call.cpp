#include "call.h"

#include <ATen/core/dispatch/Dispatcher.h>

namespace rarefy::graph {
namespace {

c10::OperatorHandle handle_of(const Node& node) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(node.op.name.c_str(), node.op.overload_name.c_str());
}

template <typename Item>
c10::IValue list_of(const std::vector<at::Tensor>& tensors) {
  c10::List<Item> list;
  for (const auto& tensor : tensors) {
    if constexpr (std::is_same_v<Item, at::Tensor>) {
      list.push_back(tensor);
    } else {
      list.push_back(tensor.defined() ? Item(tensor) : std::nullopt);
    }
  }
  return list;
}

}  // namespace

const c10::FunctionSchema& schema_of(const Node& node) { return handle_of(node).schema(); }

std::optional<size_t> argument_index(const Node& node, std::string_view name) {
  const auto& arguments = schema_of(node).arguments();
  for (size_t i = 0; i < arguments.size() && i < node.inputs.size(); ++i) {
    if (arguments[i].name() == name) {
      return i;
    }
  }
  return std::nullopt;
}

c10::IValue argument(const Node& node, std::string_view name) {
  const auto index = argument_index(node, name);
  return index ? node.inputs[*index] : c10::IValue();
}

bool writes_argument(const c10::FunctionSchema& schema, size_t i) {
  return schema.arguments()[i].alias_info() && schema.arguments()[i].alias_info()->isWrite();
}

torch::jit::Stack arguments(const Node& node, const std::function<at::Tensor(int64_t value, bool written)>& tensor_of) {
  const auto& schema = schema_of(node);
  torch::jit::Stack stack;
  for (size_t i = 0; i < node.inputs.size(); ++i) {
    if (node.input_values[i].empty()) {
      stack.push_back(node.inputs[i]);
      continue;
    }
    std::vector<at::Tensor> tensors;
    for (auto id : node.input_values[i]) {
      tensors.push_back(id < 0 ? at::Tensor() : tensor_of(id, writes_argument(schema, i)));
    }
    // An argument that may be absent ("Tensor(a)?", "Tensor[]?") takes what it takes when it is there.
    auto type = schema.arguments()[i].type();
    if (const auto optional = type->cast<c10::OptionalType>()) {
      type = optional->getElementType();
    }
    if (const auto list = type->cast<c10::ListType>()) {
      const bool optional = list->getElementType()->kind() == c10::TypeKind::OptionalType;
      stack.push_back(optional ? list_of<std::optional<at::Tensor>>(tensors) : list_of<at::Tensor>(tensors));
    } else if (tensors[0].defined()) {
      stack.emplace_back(tensors[0]);
    } else {
      stack.emplace_back();
    }
  }
  return stack;
}

std::vector<at::Tensor> call(const Node& node, torch::jit::Stack stack) {
  handle_of(node).callBoxed(stack);
  std::vector<at::Tensor> out;
  for (const auto& result : stack) {
    if (result.isTensor()) {
      out.push_back(result.toTensor());
    } else if (result.isTensorList()) {
      for (const at::Tensor& tensor : result.toTensorVector()) {
        out.push_back(tensor);
      }
    }
  }
  return out;
}

}  // namespace rarefy::graph
