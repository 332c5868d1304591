#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/core/function_schema.h>
#include <ATen/core/ivalue.h>
#include <ATen/core/stack.h>
#include <rarefy/graph/graph.h>

#include <functional>
#include <optional>
#include <string_view>
#include <vector>

// Calling the operator of a node again, on other tensors.
namespace rarefy::graph {

const c10::FunctionSchema& schema_of(const Node& node);

/// The position of an argument; nothing when the operator has none of that name.
std::optional<size_t> argument_index(const Node& node, std::string_view name);

/// A constant argument by name; None when the operator has none of that name.
c10::IValue argument(const Node& node, std::string_view name);

/// True when the operator changes argument `i` in place.
bool writes_argument(const c10::FunctionSchema& schema, size_t i);

/// The arguments of a node by position: the recorded constants, and `tensor_of(value, written)` for each tensor, where
/// `written` says that the operator changes it in place.
torch::jit::Stack arguments(const Node& node, const std::function<at::Tensor(int64_t value, bool written)>& tensor_of);

/// Runs the operator of a node: all tensors that it returns, lists flattened, as in Node::outputs.
std::vector<at::Tensor> call(const Node& node, torch::jit::Stack stack);

}  // namespace rarefy::graph
