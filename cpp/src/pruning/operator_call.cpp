#include "operator_call.h"

#include <ATen/ops/empty.h>
#include <c10/util/Exception.h>

#include <algorithm>
#include <set>
#include <sstream>

#include "graph/call.h"

namespace rarefy::pruning {
namespace {

constexpr int64_t kColdNumbers = 16 << 20;  // 64 MB of float: more than a last-level cache holds

/// The channels of a value that has `channels` of them in a dimension.
std::vector<int64_t> with(std::vector<int64_t> sizes, int64_t dim, int64_t channels) {
  sizes.at(static_cast<size_t>(dim)) = channels;
  return sizes;
}

bool channels_last(const graph::Value& weight) {
  return weight.sizes.size() == 4 && weight.tensor.defined() && !weight.tensor.is_contiguous() &&
         weight.tensor.is_contiguous(at::MemoryFormat::ChannelsLast);
}

}  // namespace

std::optional<WeightedOperator> weighted_operator(const graph::Graph& graph, const graph::Node& node) {
  static const std::set<std::string> convolutions = {
      "aten::conv1d",           "aten::conv2d",           "aten::conv3d",     "aten::conv_transpose1d",
      "aten::conv_transpose2d", "aten::conv_transpose3d", "aten::convolution"};
  const std::string& name = node.op.name;
  WeightedOperator op;
  const bool convolution = convolutions.contains(name);
  const char* weight_name = "weight";
  if (convolution || name == "aten::linear") {
    op.input_argument = 0;
  } else if (name == "aten::addmm" || name == "aten::mm") {
    weight_name = "mat2";
    op.output_dim = 1;
    op.input_dim = 0;
    op.input_argument = name == "aten::addmm" ? 1 : 0;
  } else {
    return std::nullopt;
  }
  op.weight_argument = *graph::argument_index(node, weight_name);
  op.bias_argument = name == "aten::addmm" ? std::optional<size_t>(0) : graph::argument_index(node, "bias");
  op.weight = node.input(op.weight_argument);
  const int64_t input = node.input(op.input_argument);
  if (op.weight < 0 || input < 0 || graph.values[op.weight].origin != graph::Origin::parameter) {
    return std::nullopt;
  }
  const auto input_dims = static_cast<int64_t>(graph.values[input].sizes.size());
  const auto weight_dims = static_cast<int64_t>(graph.values[op.weight].sizes.size());
  op.input_channel_dim = convolution ? input_dims - weight_dims + 1 : input_dims - 1;
  if (convolution) {
    op.groups_argument = graph::argument_index(node, "groups");
    op.groups = node.inputs.at(*op.groups_argument).toInt();
    const auto transposed = graph::argument_index(node, "transposed");
    if (name.find("transpose") != std::string::npos || (transposed && node.inputs.at(*transposed).toBool())) {
      std::swap(op.output_dim, op.input_dim);
    }
  }
  return op;
}

at::Tensor OperatorCalls::view(const std::vector<int64_t>& sizes, const at::TensorOptions& options, bool channels_last,
                               bool cold) {
  int64_t numel = 1;
  for (auto size : sizes) {
    numel *= size;
  }
  Pool& pool = pools_[c10::str(options.dtype(), options.device())];
  if (!pool.numbers.defined() || pool.numbers.numel() < 2 * numel) {
    pool.numbers = at::empty({std::max(kColdNumbers, 2 * numel)}, options).uniform_(-1, 1);
    pool.next = 0;
  }
  int64_t offset = 0;
  if (cold) {
    // Behind the inputs at the start, on a cache line of its own.
    const int64_t half = pool.numbers.numel() / 2;
    const int64_t room = pool.numbers.numel() - half - numel;
    offset = half + (room == 0 ? 0 : pool.next % (room + 1)) / 64 * 64;
    pool.next += numel + 64;
  }
  auto flat = pool.numbers.narrow(0, offset, numel);
  if (!channels_last) {
    return flat.view(sizes);
  }
  return flat.view({sizes[0], sizes[2], sizes[3], sizes[1]}).permute({0, 3, 1, 2});
}

torch::jit::Stack OperatorCalls::arguments(const graph::Graph& graph, const graph::Node& node,
                                           const WeightedOperator& op, int64_t outputs, int64_t inputs) {
  const graph::Value& weight = graph.values[op.weight];
  const graph::Value& input = graph.values[node.input(op.input_argument)];
  // Of a convolution's weight, one of the two dimensions counts the channels of one group: the other one the groups.
  const bool transposed = op.groups_argument && op.output_dim == 1;
  int64_t& inside = transposed ? outputs : inputs;
  int64_t& across = transposed ? inputs : outputs;
  const int64_t per_group = op.groups > 1 ? weight.sizes.at(0) / op.groups : 1;
  int64_t groups = op.groups;
  if (groups > 1 && inside == weight.sizes.at(1)) {
    groups = std::max<int64_t>(1, (across + per_group - 1) / per_group);  // whole groups are gone
    across = groups * per_group;
  } else if (groups > 1) {
    across = std::max<int64_t>(1, (across + groups - 1) / groups) * groups;
  }
  const int64_t input_channels = transposed ? across : inside * groups;
  const int64_t output_channels = transposed ? inside * groups : across;

  const auto options = at::TensorOptions()
                           .dtype(weight.dtype)
                           .device(weight.tensor.defined() ? weight.tensor.device() : c10::Device(at::kCPU));
  const bool last = channels_last(weight);
  torch::jit::Stack stack = node.inputs;
  stack.at(op.input_argument) = view(with(input.sizes, op.input_channel_dim, input_channels),
                                     options.dtype(input.dtype), last && input.sizes.size() == 4, false);
  stack.at(op.weight_argument) =
      view(with(with(weight.sizes, op.output_dim, outputs), op.input_dim, inputs), options, last, true);
  if (op.bias_argument && node.input(*op.bias_argument) >= 0) {
    stack.at(*op.bias_argument) = view({output_channels}, options, false, true);
  }
  if (op.groups_argument) {
    stack.at(*op.groups_argument) = groups;
  }
  return stack;
}

std::string OperatorCalls::key(const graph::Graph& graph, const graph::Node& node, const WeightedOperator& op) {
  std::ostringstream out;
  const graph::Value& input = graph.values[node.input(op.input_argument)];
  const graph::Value& weight = graph.values[op.weight];
  out << node.op << ' ' << input.sizes << input.dtype << ' ' << weight.sizes << weight.dtype << channels_last(weight)
      << ' ' << (op.bias_argument && node.input(*op.bias_argument) >= 0);
  for (const auto& constant : node.inputs) {
    out << ' ' << constant;
  }
  return out.str();
}

}  // namespace rarefy::pruning
