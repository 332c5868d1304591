#include <ATen/core/grad_mode.h>
#include <ATen/ops/linear.h>
#include <ATen/ops/randn.h>
#include <fmt/format.h>
#include <rarefy/graph/record.h>
#include <rarefy/nn/linear.h>
#include <rarefy/nn/sparse_linear.h>
#include <rarefy/pruning/sparse_report.h>
#include <rarefy/pruning/state.h>
#include <torch/nn/modules/linear.h>

#include <algorithm>
#include <set>
#include <typeinfo>

#include "graph/operators.h"
#include "pruning/sparsify_plan.h"

namespace rarefy::pruning {
namespace {

std::string block_text(const std::pair<int64_t, int64_t>& block) {
  return block.first * block.second == 1 ? "single weights" : fmt::format("blocks of {}x{}", block.first, block.second);
}

/// A linear layer of a model in C++.
struct Candidate {
  std::string name;
  std::shared_ptr<torch::nn::Module> module;
  std::shared_ptr<nn::LinearImpl> own;  // of rarefy, which can switch where it is; null otherwise
  at::Tensor weight, bias;
  std::vector<nn::Slot> slots;
  std::string reason;  // why it cannot be sparse; empty when it can
};

bool in_containers(const std::vector<nn::Slot>& slots) {
  return std::all_of(slots.begin(), slots.end(), [](const auto& slot) { return nn::is_replaceable(*slot.parent); });
}

std::vector<Candidate> candidates(torch::nn::Module& model) {
  const auto slots = nn::slots_below(model);
  std::map<const c10::TensorImpl*, std::vector<std::string>> names;  // of every parameter
  for (const auto& item : model.named_parameters()) {
    names[item.value().unsafeGetTensorImpl()].push_back(item.key());
  }
  std::vector<Candidate> found;
  std::set<const torch::nn::Module*> seen;
  for (const auto& item : model.named_modules("", /*include_self=*/false)) {
    const auto& module = item.value();
    if (!seen.insert(module.get()).second) {
      continue;
    }
    Candidate candidate{item.key(), module, nullptr, {}, {}, slots.at(module.get()), ""};
    const auto given = std::dynamic_pointer_cast<torch::nn::LinearImpl>(module);
    candidate.own = std::dynamic_pointer_cast<nn::LinearImpl>(module);
    if (candidate.own != nullptr) {
      candidate.weight = candidate.own->weight;
      candidate.bias = candidate.own->bias;
      if (candidate.own->mode() != nn::Quantizable::Mode::floating) {
        candidate.reason = "it is quantized";
      } else if (candidate.own->is_sparse()) {
        candidate.reason = "it is sparse already";
      }
    } else if (given != nullptr) {
      candidate.weight = given->weight;
      candidate.bias = given->bias;
      if (typeid(*module) != typeid(torch::nn::LinearImpl)) {
        candidate.reason = "it is a subclass of torch::nn::Linear";
      } else if (!in_containers(candidate.slots)) {
        candidate.reason = "a typed member cannot be replaced: make it a rarefy::nn::Linear";
      }
    } else {
      continue;
    }
    if (candidate.reason.empty()) {
      std::set<std::string> own;  // a module that is held twice has its weight under both names
      for (const auto& slot : candidate.slots) {
        own.insert(slot.name + ".weight");
      }
      for (const auto& name : names[candidate.weight.unsafeGetTensorImpl()]) {
        if (own.count(name) == 0) {
          candidate.reason = "its weight is also " + name;
        }
      }
    }
    if (candidate.reason.empty() && module->named_buffers(false).contains(mask_key("weight"))) {
      candidate.reason = "a pruner is at work on it: finalize() it first";
    }
    found.push_back(std::move(candidate));
  }
  return found;
}

}  // namespace

void SparsifyOptions::validate() const {
  TORCH_CHECK_VALUE(gain >= 1.0, "[sparsify] gain must be at least 1, got ", gain);
  TORCH_CHECK_VALUE(seconds > 0, "[sparsify] seconds must be positive, got ", seconds);
  TORCH_CHECK_VALUE(least_sparsity >= 0.0 && least_sparsity <= 1.0, "[sparsify] least_sparsity must be in [0, 1], got ",
                    least_sparsity);
  TORCH_CHECK_VALUE(!blocks.empty(), "[sparsify] blocks must not be empty");
  for (const auto& [height, width] : blocks) {
    TORCH_CHECK_VALUE(height > 0 && width > 0, "[sparsify] blocks must have positive sizes, got ", height, " x ",
                      width);
  }
}

int64_t whole_of(const graph::Graph& graph, int64_t value) {
  const auto& view = graph.values.at(static_cast<size_t>(value));
  if (view.memory < 0) {
    return value;
  }
  return graph.values.at(static_cast<size_t>(view.memory)).numel() == view.numel() ? view.memory : value;
}

std::map<std::string, std::vector<int64_t>> linear_samples(const graph::Graph& graph) {
  std::map<std::string, std::vector<int64_t>> out;
  for (const int64_t id : graph.schedule) {
    const auto& node = graph.nodes.at(static_cast<size_t>(id));
    // LibTorch's linear layers are addmm(bias, x, weight.t()) for matrices.
    const auto kind = graph::kind_of(node.op);
    const size_t first = kind == graph::Kind::addmm ? 1 : 0;
    if ((kind != graph::Kind::linear && kind != graph::Kind::addmm) || node.input(first) < 0 ||
        node.input(first + 1) < 0) {
      continue;
    }
    const auto& x = graph.values.at(static_cast<size_t>(node.input(first)));
    const auto& weight = graph.values.at(static_cast<size_t>(whole_of(graph, node.input(first + 1))));
    if (weight.origin == graph::Origin::parameter && !x.sizes.empty() && x.sizes.back() > 0) {
      out[weight.name].push_back(x.numel() / x.sizes.back());
    }
  }
  return out;
}

std::optional<ops::SparseWeight> choose_sparse(SparsifiedLayer& layer, const at::Tensor& weight, const at::Tensor& bias,
                                               const SparsifyOptions& options) {
  options.validate();
  const at::NoGradGuard no_grad;
  const auto type = weight.scalar_type();
  layer.elements = weight.numel();
  const auto dense = weight.detach();
  const int64_t kept = dense.count_nonzero().item<int64_t>();
  layer.sparsity = layer.elements == 0 ? 0.0 : 1.0 - static_cast<double>(kept) / static_cast<double>(layer.elements);
  const auto stays = [&](std::string reason) {
    layer.reason = std::move(reason);
    return std::nullopt;
  };
  if (layer.samples.empty()) {
    return stays("the example does not run it");
  }
  if (!weight.device().is_cpu()) {
    return stays("it is on " + weight.device().str() + ", and the kernels are for the CPU");
  }
  if (type != at::kFloat && type != at::kBFloat16) {
    return stays(fmt::format("there are kernels for float32 and bfloat16, not for {}", c10::toString(type)));
  }
  if (layer.sparsity < options.least_sparsity) {
    return stays(fmt::format("sparsity {:.3f} is below {}: not measured", layer.sparsity, options.least_sparsity));
  }
  std::map<int64_t, int64_t> calls;  // by rows
  for (const int64_t rows : layer.samples) {
    ++calls[rows];
  }
  std::vector<std::pair<at::Tensor, int64_t>> inputs;
  for (const auto& [rows, count] : calls) {
    inputs.emplace_back(at::randn({rows, weight.size(1)}).to(type), count);
  }
  const auto of_bias = bias.defined() ? std::optional(bias.detach()) : std::nullopt;
  std::optional<ops::SparseWeight> best;
  double best_ratio = 0;
  for (const auto& block : options.blocks) {
    const auto& [height, width] = block;
    if (weight.size(0) % height != 0 || weight.size(1) % width != 0) {
      continue;
    }
    auto sparse = ops::to_sparse_weight(dense, height, width);
    // Blocks that are half empty hold nothing that single weights do not hold better.
    if (height * width > 1 && sparse.values.numel() > 2 * kept) {
      continue;
    }
    double dense_time = 0, sparse_time = 0;
    for (const auto& input : inputs) {
      const auto& x = input.first;
      const auto [a, b] =
          compare_times([&] { at::linear(x, dense, of_bias); }, [&] { ops::sparse_linear(x, sparse, of_bias); },
                        options.seconds / static_cast<double>(inputs.size()));
      dense_time += a * static_cast<double>(input.second);
      sparse_time += b * static_cast<double>(input.second);
    }
    const double ratio = dense_time / std::max(sparse_time, 1e-12);
    if (ratio > best_ratio) {
      best_ratio = ratio;
      best = std::move(sparse);
      layer.block = block;
      layer.dense_milliseconds = dense_time;
      layer.sparse_milliseconds = sparse_time;
    }
  }
  if (!best.has_value()) {
    return stays("no block fits its shape and its zeros");
  }
  layer.sparse = best_ratio >= options.gain;
  layer.reason =
      fmt::format("{} {} as fast as dense", block_text(layer.block),
                  layer.sparse ? fmt::format("are {:.2f} times", best_ratio)
                               : fmt::format("must be {} times, are {:.2f} times", options.gain, best_ratio));
  return layer.sparse ? best : std::nullopt;
}

SparsifyPlan::SparsifyPlan(torch::nn::Module& model, const std::function<std::vector<at::Tensor>()>& forward,
                           const std::vector<at::Tensor>& inputs, const SparsifyOptions& options)
    : SparsifyPlan(model, graph::record(model, forward, inputs), options) {}

SparsifyPlan::SparsifyPlan(torch::nn::Module& model, const graph::Graph& graph, const SparsifyOptions& options) {
  options.validate();
  const auto samples = linear_samples(graph);
  for (auto& candidate : candidates(model)) {
    SparsifiedLayer layer;
    layer.name = candidate.name;
    if (const auto position = samples.find(candidate.name + ".weight"); position != samples.end()) {
      layer.samples = position->second;
    }
    if (!candidate.reason.empty()) {
      layer.elements = candidate.weight.defined() ? candidate.weight.numel() : 0;
      layer.reason = candidate.reason;
    } else if (auto sparse = choose_sparse(layer, candidate.weight, candidate.bias, options)) {
      changes_.push_back({candidate.module, candidate.own, candidate.weight, candidate.bias, candidate.slots, *sparse});
    }
    report_.layers.push_back(std::move(layer));
  }
}

void SparsifyPlan::apply() const {
  for (const auto& change : changes_) {
    if (change.own != nullptr) {
      change.own->become_sparse(change.sparse);
      continue;
    }
    const auto twin = std::make_shared<nn::SparseLinearImpl>(change.sparse, change.weight.size(1), change.bias);
    twin->train(change.module->is_training());
    for (const auto& slot : change.slots) {
      nn::put(slot, torch::nn::AnyModule(twin));
    }
  }
}

void SparsifyPlan::undo() const {
  for (const auto& change : changes_) {
    if (change.own != nullptr) {
      change.own->become_dense(change.weight);
      continue;
    }
    for (const auto& slot : change.slots) {
      nn::put(slot, torch::nn::AnyModule(std::dynamic_pointer_cast<torch::nn::LinearImpl>(change.module)));
    }
  }
}

SparsifyReport sparsify(torch::nn::Module& model, const std::function<std::vector<at::Tensor>()>& forward,
                        const std::vector<at::Tensor>& inputs, const SparsifyOptions& options) {
  const SparsifyPlan plan(model, forward, inputs, options);
  plan.apply();
  return plan.report();
}

int64_t to_dense(torch::nn::Module& model) {
  const auto slots = nn::slots_below(model);
  std::vector<std::pair<std::shared_ptr<nn::SparseLinearImpl>, std::vector<nn::Slot>>> replaced;
  std::vector<nn::LinearImpl*> switched;
  std::set<const torch::nn::Module*> seen;
  for (const auto& item : model.named_modules("", /*include_self=*/false)) {
    if (!seen.insert(item.value().get()).second) {
      continue;
    }
    if (auto sparse = std::dynamic_pointer_cast<nn::SparseLinearImpl>(item.value())) {
      const auto& places = slots.at(sparse.get());
      TORCH_CHECK_VALUE(in_containers(places), "[to_dense] ", item.key(),
                        " must be in a container: a typed member cannot be replaced");
      replaced.emplace_back(std::move(sparse), places);
    } else if (auto* own = dynamic_cast<nn::LinearImpl*>(item.value().get()); own != nullptr && own->is_sparse()) {
      switched.push_back(own);
    }
  }
  for (const auto& [sparse, places] : replaced) {
    const torch::NoGradGuard no_grad;
    const auto twin = std::make_shared<torch::nn::LinearImpl>(
        torch::nn::LinearOptions(sparse->in_features(), sparse->out_features()).bias(sparse->bias.defined()));
    twin->weight.set_data(sparse->dense_weight());
    if (sparse->bias.defined()) {
      twin->bias.set_data(sparse->bias.detach());
    }
    twin->train(sparse->is_training());
    for (const auto& slot : places) {
      nn::put(slot, torch::nn::AnyModule(twin));
    }
  }
  for (auto* own : switched) {
    own->become_dense();
  }
  return static_cast<int64_t>(replaced.size() + switched.size());
}

}  // namespace rarefy::pruning
