#include <fmt/format.h>
#include <rarefy/pruning/enforce.h>
#include <rarefy/pruning/optimizer_state.h>
#include <torch/optim/adagrad.h>
#include <torch/optim/adam.h>
#include <torch/optim/adamw.h>
#include <torch/optim/lbfgs.h>
#include <torch/optim/rmsprop.h>
#include <torch/optim/sgd.h>

#include <algorithm>
#include <typeinfo>
#include <unordered_map>
#include <utility>

namespace rarefy::pruning {
namespace {

using torch::optim::OptimizerParamState;
using Tensors = std::vector<std::pair<const char*, at::Tensor>>;

template <typename State>
Tensors moments(const State& state) {
  return {{"exp_avg", state.exp_avg()}, {"exp_avg_sq", state.exp_avg_sq()}, {"max_exp_avg_sq", state.max_exp_avg_sq()}};
}

Tensors tensors_of(const OptimizerParamState& state) {
  if (const auto* sgd = dynamic_cast<const torch::optim::SGDParamState*>(&state)) {
    return {{"momentum_buffer", sgd->momentum_buffer()}};
  }
  if (const auto* adam = dynamic_cast<const torch::optim::AdamParamState*>(&state)) {
    return moments(*adam);
  }
  if (const auto* adamw = dynamic_cast<const torch::optim::AdamWParamState*>(&state)) {
    return moments(*adamw);
  }
  if (const auto* rmsprop = dynamic_cast<const torch::optim::RMSpropParamState*>(&state)) {
    return {{"square_avg", rmsprop->square_avg()},
            {"momentum_buffer", rmsprop->momentum_buffer()},
            {"grad_avg", rmsprop->grad_avg()}};
  }
  if (const auto* adagrad = dynamic_cast<const torch::optim::AdagradParamState*>(&state)) {
    return {{"sum", adagrad->sum()}};
  }
  TORCH_CHECK_VALUE(
      dynamic_cast<const torch::optim::LBFGSParamState*>(&state) == nullptr,
      "[optimizer_tensors] LBFGS must not have taken a step: its history is one vector over all parameters, "
      "make a new optimizer after pruning");
  TORCH_CHECK_VALUE(false,
                    "[optimizer_tensors] the optimizer must be SGD, Adam, AdamW, RMSprop or Adagrad, or have no state");
}

/// Whether the optimizer is a Kind, and no class that is derived from it, with eps > 0: 0 / 0 is no zero.
template <typename Kind, typename Options>
bool is_with_eps(const torch::optim::Optimizer& optimizer) {
  const auto& groups = optimizer.param_groups();
  return typeid(optimizer) == typeid(Kind) && std::all_of(groups.begin(), groups.end(), [](const auto& group) {
           return static_cast<const Options&>(group.options()).eps() > 0.0;
         });
}

/// Which dimensions of the parameter a state tensor of one dimension less may have.
std::vector<std::vector<int64_t>> candidates(const OptimizerTensor& state, at::IntArrayRef sizes) {
  const auto dims = static_cast<int64_t>(sizes.size());
  std::vector<int64_t> dropped;
  if (state.name.ends_with("row")) {
    dropped = {dims - 1};
  } else if (state.name.ends_with("col")) {
    dropped = {dims - 2};
  } else {
    for (int64_t d = 0; d < dims; ++d) {
      dropped.push_back(d);
    }
  }
  std::vector<std::vector<int64_t>> result;
  for (const int64_t drop : dropped) {
    std::vector<int64_t> left, left_sizes;
    for (int64_t d = 0; d < dims; ++d) {
      if (d != drop) {
        left.push_back(d);
        left_sizes.push_back(sizes[static_cast<size_t>(d)]);
      }
    }
    if (state.value.sizes() == at::IntArrayRef(left_sizes)) {
      result.push_back(std::move(left));
    }
  }
  return result;
}

}  // namespace

bool keeps_zeros(const torch::optim::Optimizer& optimizer) {
  using namespace torch::optim;
  return typeid(optimizer) == typeid(SGD) || is_with_eps<Adam, AdamOptions>(optimizer) ||
         is_with_eps<AdamW, AdamWOptions>(optimizer) || is_with_eps<RMSprop, RMSpropOptions>(optimizer) ||
         is_with_eps<Adagrad, AdagradOptions>(optimizer);
}

std::vector<OptimizerTensor> optimizer_tensors(const torch::optim::Optimizer& optimizer,
                                               const std::vector<graph::NamedTensor>& parameters) {
  std::unordered_map<const void*, std::string> names;
  for (const auto& parameter : parameters) {
    names.emplace(parameter.value.unsafeGetTensorImpl(), parameter.name);
  }
  bool holds_any = false;
  for (const auto& group : optimizer.param_groups()) {
    for (const auto& p : group.params()) {
      holds_any = holds_any || names.count(p.unsafeGetTensorImpl()) > 0;
    }
  }
  TORCH_CHECK_VALUE(holds_any,
                    "[optimizer_tensors] the optimizer must hold parameters of the model, but holds none of them");
  std::vector<OptimizerTensor> result;
  for (const auto& [key, state] : optimizer.state()) {
    const auto tensors = tensors_of(*state);
    const auto position = names.find(key);
    if (position == names.end()) {
      continue;
    }
    for (const auto& [name, value] : tensors) {
      if (value.defined()) {
        result.push_back({position->second, name, value});
      }
    }
  }
  return result;
}

Kept kept_of_state(const OptimizerTensor& state, at::IntArrayRef sizes, const Kept& kept) {
  const auto of = state.value.sizes();
  if (of == sizes) {
    return kept;
  }
  if (state.value.numel() == 1) {
    return {};
  }
  bool factored = of.size() == sizes.size();
  for (size_t d = 0; factored && d < of.size(); ++d) {
    factored = of[d] == sizes[d] || of[d] == 1;
  }
  Kept result;
  if (factored) {
    for (const auto& [dim, indices] : kept) {
      if (of[static_cast<size_t>(dim)] == sizes[static_cast<size_t>(dim)]) {
        result.emplace(dim, indices);
      }
    }
    return result;
  }
  std::vector<Kept> found;
  if (of.size() + 1 == sizes.size()) {
    for (const auto& dims : candidates(state, sizes)) {
      Kept cut;
      for (size_t d = 0; d < dims.size(); ++d) {
        if (const auto position = kept.find(dims[d]); position != kept.end()) {
          cut.emplace(static_cast<int64_t>(d), position->second);
        }
      }
      if (std::find(found.begin(), found.end(), cut) == found.end()) {
        found.push_back(std::move(cut));
      }
    }
  }
  TORCH_CHECK_VALUE(found.size() == 1, "[Surgery] optimizer state '", state.name, "' of ", state.parameter,
                    found.empty() ? " must have the parameter's shape, or one that follows from it"
                                  : " must say which dimensions of the parameter it has, but several fit",
                    ": the parameter is ", sizes, ", the state ", of);
  return found.front();
}

}  // namespace rarefy::pruning
