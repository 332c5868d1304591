#include <ATen/core/grad_mode.h>
#include <ATen/ops/zeros.h>
#include <c10/util/Exception.h>
#include <rarefy/ops/apply_masks.h>
#include <rarefy/pruning/enforce.h>
#include <rarefy/pruning/optimizer_state.h>

#include <unordered_map>
#include <utility>

namespace rarefy::pruning {
namespace {

std::vector<MaskedTensor> tensors_of(const PruningState& state) {
  std::vector<MaskedTensor> tensors;
  for (const auto& parameter : state.parameters) {
    tensors.push_back({parameter.name, parameter.value, parameter.mask});
  }
  return tensors;
}

/// Tensors with the masks that belong to them.
struct Pairs {
  std::vector<at::Tensor> tensors, masks;

  void add(const at::Tensor& tensor, const at::Tensor& mask) {
    tensors.push_back(tensor);
    masks.push_back(tensor.device() == mask.device() ? mask : mask.to(tensor.device()));
  }
  void add_gradient(const MaskedParameter& parameter) {
    const auto& gradient = parameter.value.grad();
    if (gradient.defined() && gradient.layout() == at::kStrided) {
      add(gradient, parameter.mask);
    }
  }
  void apply() const {
    const at::NoGradGuard no_grad;
    ops::apply_masks_(tensors, masks);
  }
};

Pairs values_of(const PruningState& state) {
  Pairs pairs;
  for (const auto& parameter : state.parameters) {
    pairs.add(parameter.value, parameter.mask);
  }
  return pairs;
}

}  // namespace

void apply_masks(const PruningState& state) { enforce(state, std::vector<Moment>()); }

void apply_values(const PruningState& state) {
  check_fit(tensors_of(state));
  values_of(state).apply();
}

bool mask_gradients(const PruningState& state) {
  check_fit(tensors_of(state));
  Pairs pairs;
  bool all = true;
  for (const auto& parameter : state.parameters) {
    pairs.add_gradient(parameter);
    const auto& gradient = parameter.value.grad();
    all = all && (!gradient.defined() || gradient.layout() == at::kStrided);
  }
  pairs.apply();
  return all;
}

void enforce(const PruningState& state, const std::vector<Moment>& moments) {
  check_fit(tensors_of(state));
  auto pairs = values_of(state);
  for (const auto& parameter : state.parameters) {
    pairs.add_gradient(parameter);
  }
  for (const auto& [index, moment] : moments) {
    TORCH_CHECK_INDEX(index < state.parameters.size(), "[enforce] a moment must be of one of ", state.parameters.size(),
                      " parameters, got that of parameter ", index);
    const auto& parameter = state.parameters[index];
    TORCH_CHECK_VALUE(moment.sizes() == parameter.value.sizes(), "[enforce] a moment of '", parameter.name,
                      "' must have its shape ", parameter.value.sizes(), ", got ", moment.sizes());
    pairs.add(moment, parameter.mask);
  }
  pairs.apply();
}

void enforce(const PruningState& state, const torch::optim::Optimizer* optimizer) {
  enforce(state, optimizer == nullptr ? std::vector<Moment>() : moments_of(state, *optimizer));
}

std::vector<Moment> moments_of(const PruningState& state, const torch::optim::Optimizer& optimizer) {
  std::vector<graph::NamedTensor> parameters;
  std::unordered_map<std::string, size_t> positions;
  for (size_t i = 0; i < state.parameters.size(); ++i) {
    parameters.push_back({state.parameters[i].name, state.parameters[i].value});
    positions.emplace(state.parameters[i].name, i);
  }
  std::vector<Moment> moments;
  for (const auto& tensor : optimizer_tensors(optimizer, parameters)) {
    const size_t position = positions.at(tensor.parameter);
    const auto& value = state.parameters[position].value;
    if (value.numel() > 1 && tensor.value.sizes() == value.sizes() && tensor.value.is_floating_point()) {
      moments.push_back({position, tensor.value});
    }
  }
  return moments;
}

std::vector<TensorVersion> versions_of(const PruningState& state, const std::vector<Moment>& moments) {
  std::vector<TensorVersion> versions;
  const auto add = [&](const at::Tensor& tensor) {
    const decltype(TensorVersion::tensor) watched(tensor.getIntrusivePtr());
    versions.push_back({watched, tensor.const_data_ptr(), tensor._version()});
  };
  for (const auto& parameter : state.parameters) {
    add(parameter.value);
    add(parameter.mask);
  }
  for (const auto& moment : moments) {
    add(moment.value);
  }
  return versions;
}

PruningState masked_parameters(const torch::nn::Module& model) {
  PruningState state;
  state.step = at::zeros({}, at::kLong);
  for (const auto& item : masked_tensors(model)) {
    state.parameters.push_back({item.name, item.value, item.mask});
  }
  return state;
}

std::vector<Stray> stray_values(const PruningState& state) { return rarefy::stray_values(tensors_of(state)); }

void check_masks(const PruningState& state, const char* function) { check_masks(tensors_of(state), function); }

}  // namespace rarefy::pruning
