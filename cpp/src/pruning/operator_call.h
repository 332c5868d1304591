#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/core/ivalue.h>
#include <ATen/core/stack.h>
#include <rarefy/graph/graph.h>

#include <cstdint>
#include <map>
#include <optional>
#include <string>
#include <vector>

namespace rarefy::pruning {

/// What multiplies a weight: which arguments it has, and which dimensions of the weight are channels.
struct WeightedOperator {
  int64_t weight = -1;  // the value
  int64_t output_dim = 0, input_dim = 1;
  size_t input_argument = 0, weight_argument = 1;
  std::optional<size_t> bias_argument;
  std::optional<size_t> groups_argument;
  int64_t input_channel_dim = -1;  // of the input
  int64_t groups = 1;
};

/// Reads a convolution or linear layer off a node; nothing for any other operator, and when the weight is not a
/// parameter of the model.
std::optional<WeightedOperator> weighted_operator(const graph::Graph& graph, const graph::Node& node);

/// Calls weighted operators on numbers of other shapes.
///
/// Inputs lie in memory that is used again and again, as the result of the operator before would; each weight lies
/// where none of the calls before has read, as in a model whose weights do not fit into a cache.
class OperatorCalls {
 public:
  /// The arguments for `outputs` and `inputs` slices of the weight's dimensions. Slices that the operator cannot have
  /// (a group of a convolution must be whole) are rounded up.
  torch::jit::Stack arguments(const graph::Graph& graph, const graph::Node& node, const WeightedOperator& op,
                              int64_t outputs, int64_t inputs);

  /// Equal for operators that take equally long at equal widths.
  static std::string key(const graph::Graph& graph, const graph::Node& node, const WeightedOperator& op);

 private:
  at::Tensor view(const std::vector<int64_t>& sizes, const at::TensorOptions& options, bool channels_last, bool cold);

  struct Pool {
    at::Tensor numbers;
    int64_t next = 0;
  };
  std::map<std::string, Pool> pools_;
};

}  // namespace rarefy::pruning
