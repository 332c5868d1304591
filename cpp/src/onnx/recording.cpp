#include "onnx/recording.h"

#include <ATen/ops/arange.h>
#include <ATen/ops/equal.h>
#include <ATen/ops/remainder.h>
#include <c10/util/Exception.h>
#include <rarefy/graph/constants.h>
#include <rarefy/graph/record.h>

#include <set>

namespace rarefy::onnx {
namespace {

/// Copies with `count` rows: those that there are, from the first one again after the last.
std::vector<at::Tensor> with_rows(const std::vector<at::Tensor>& inputs, int64_t count) {
  std::vector<at::Tensor> out;
  for (const auto& input : inputs) {
    const auto rows =
        at::remainder(at::arange(count, at::TensorOptions().dtype(at::kLong).device(input.device())), input.size(0));
    out.push_back(input.index_select(0, rows));
  }
  return out;
}

constexpr const char* kHint = " (dynamic_batch = false fixes the size of the batch)";

/// Both runs must have called the same operators on the same tensors.
void check_equal_runs(const graph::Graph& a, int64_t batch, const graph::Graph& b, int64_t other) {
  for (size_t i = 0; i < std::min(a.schedule.size(), b.schedule.size()); ++i) {
    const auto &x = a.nodes[a.schedule[i]], &y = b.nodes[b.schedule[i]];
    TORCH_CHECK_VALUE(
        x.op == y.op && a.schedule[i] == b.schedule[i] && x.input_values == y.input_values && x.outputs == y.outputs,
        "[export_onnx] the model must run the same operators for every batch, but runs ", x.describe(), " for ", batch,
        " samples where it runs ", y.describe(), " for ", other, kHint);
  }
  TORCH_CHECK_VALUE(a.schedule.size() == b.schedule.size() && a.outputs == b.outputs,
                    "[export_onnx] the model must run the same operators for every batch, but runs ", a.schedule.size(),
                    " of them for ", batch, " samples and ", b.schedule.size(), " for ", other, kHint);
  for (size_t i = 0; i < a.values.size() && i < b.values.size(); ++i) {
    TORCH_CHECK_VALUE(a.values[i].sizes.size() == b.values[i].sizes.size(),
                      "[export_onnx] the model's tensors must have as many dimensions for every batch", kHint);
  }
}

/// Constants whose sizes are those of every run must be equal; the others are looked at where they are used.
/// The copies of what is equal are given free.
void check_equal_constants(const graph::Graph& a, std::vector<Recording::Run>& others) {
  std::set<int64_t> read(a.outputs.begin(),
                         a.outputs.end());  // inside of operators there are others, without data even
  for (auto index : a.schedule) {
    for (const auto& argument : a.nodes[index].input_values) {
      read.insert(argument.begin(), argument.end());
    }
  }
  read.erase(-1);
  for (auto id : read) {
    const auto& x = a.values[id];
    if (x.origin != graph::Origin::constant || !x.tensor.defined() ||
        !std::all_of(others.begin(), others.end(),
                     [&](const Recording::Run& run) { return run.graph.values[id].sizes == x.sizes; })) {
      continue;
    }
    for (auto& run : others) {
      auto& y = run.graph.values[id];
      TORCH_CHECK_VALUE(y.tensor.defined() && at::equal(x.tensor, y.tensor),
                        "[export_onnx] constants must not depend on the size of the batch, but one of shape ",
                        x.tensor.sizes(), " does (dynamic_batch = false fixes it)");
      y.tensor.reset();
    }
  }
}

/// Parameters do not change any more: what is computed from them is constant.
graph::Graph fold(graph::Graph graph) {
  for (auto& value : graph.values) {
    value.origin = value.origin == graph::Origin::parameter ? graph::Origin::buffer : value.origin;
  }
  // The weights before they are rounded to a format: their codes follow from them.
  const auto outputs = graph.outputs;
  for (const auto& node : graph.nodes) {
    if (rounds_to_format(node) && node.input(0) >= 0) {
      graph.outputs.push_back(node.input(0));
    }
  }
  auto folded = graph::fold_constants(graph);
  folded.outputs = outputs;
  return folded;
}

}  // namespace

Recording record_runs(torch::nn::Module& model,
                      const std::function<std::vector<at::Tensor>(const std::vector<at::Tensor>&)>& forward,
                      const std::vector<at::Tensor>& inputs, bool dynamic) {
  const auto record = [&](const std::vector<at::Tensor>& tensors) {
    return graph::record(model, [&] { return forward(tensors); }, tensors);
  };
  Recording out;
  if (!dynamic) {
    std::vector<at::Tensor> copies;  // one tensor that is given twice is two inputs
    for (const auto& input : inputs) {
      copies.push_back(input.clone());
    }
    out.graph = fold(record(copies));
    return out;
  }
  // With one sample, sizes of 1 that follow the batch look like those that broadcast.
  out.batch = std::max<int64_t>(inputs.at(0).size(0), 2);
  auto graph = record(with_rows(inputs, out.batch));
  // The next size tells what follows the batch, a distant one that it does so in proportion: 2 / 2 and 3 / 2 are both 1.
  for (const auto batch : {out.batch + 1, 2 * out.batch + 3}) {
    graph::Graph other;
    try {
      other = record(with_rows(inputs, batch));
    } catch (const c10::Error& error) {
      TORCH_CHECK_VALUE(false, "[export_onnx] the model must run for every batch, but runs for ", out.batch,
                        " samples and not for ", batch, ", rows of the inputs repeated", kHint, ": ",
                        error.what_without_backtrace());
    }
    check_equal_runs(graph, out.batch, other, batch);
    out.others.push_back({fold(std::move(other)), batch});
  }
  out.graph = fold(std::move(graph));
  check_equal_constants(out.graph, out.others);
  return out;
}

}  // namespace rarefy::onnx
