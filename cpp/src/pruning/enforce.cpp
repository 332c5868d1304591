#include <ATen/core/grad_mode.h>
#include <ATen/ops/zeros.h>
#include <c10/util/Exception.h>
#include <fmt/format.h>
#include <rarefy/ops/apply_masks.h>
#include <rarefy/pruning/enforce.h>
#include <rarefy/pruning/optimizer_state.h>
#include <torch/nn/module.h>

#include <unordered_map>
#include <unordered_set>
#include <utility>

#include "ops/mask_checks.h"
#include "pruning/module_buffers.h"

namespace rarefy::pruning {
namespace {

/// The operators check too, but know no names.
void check(const PruningState& state) {
  for (const auto& parameter : state.parameters) {
    const auto& [name, value, mask] = std::tie(parameter.name, parameter.value, parameter.mask);
    TORCH_CHECK_VALUE(mask.defined() && mask.scalar_type() == at::kByte && mask.dim() == 1 &&
                          mask.numel() == ops::mask_bytes(value.numel()),
                      "[masks] the mask of '", name, "' must hold ", ops::mask_bytes(value.numel()),
                      " bytes (uint8) for shape ", value.sizes(), ", got ", mask.defined() ? mask.numel() : 0, " of ",
                      mask.scalar_type());
    TORCH_CHECK_VALUE(mask.device() == value.device(), "[masks] the mask of '", name,
                      "' must be on the parameter's device ", value.device(), ", got ", mask.device());
  }
}

/// Masks, and what pruners keep beside them.
bool is_beside_parameter(const std::string& key) {
  return key.ends_with(mask_key("")) || key.ends_with("_mask_score") || key.ends_with("_mask_latent") ||
         key.ends_with("_mask_rewind");
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
  check(state);
  values_of(state).apply();
}

bool mask_gradients(const PruningState& state) {
  check(state);
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
  check(state);
  auto pairs = values_of(state);
  for (const auto& parameter : state.parameters) {
    pairs.add_gradient(parameter);
  }
  for (const auto& [index, moment] : moments) {
    TORCH_CHECK_INDEX(index < state.parameters.size(), "[enforce] a moment must be of one of ",
                      state.parameters.size(), " parameters, got that of parameter ", index);
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

std::vector<Stray> stray_values(const PruningState& state) {
  check(state);
  const auto pairs = values_of(state);
  const auto found = ops::stray_values(pairs.tensors, pairs.masks).cpu();
  const auto rows = found.accessor<int64_t, 2>();
  std::vector<Stray> result;
  for (size_t i = 0; i < state.parameters.size(); ++i) {
    const auto row = static_cast<int64_t>(i);
    if (rows[row][0] > 0) {
      result.push_back({state.parameters[i].name, rows[row][0], rows[row][1]});
    }
  }
  return result;
}

PruningState masked_parameters(const torch::nn::Module& model) {
  PruningState state;
  state.step = at::zeros({}, at::kLong);
  const std::string suffix = mask_key("");
  std::unordered_set<const torch::nn::Module*> visited;
  const auto visit = [&](const std::string& path, const torch::nn::Module& module) {
    if (!visited.insert(&module).second) {
      return;
    }
    const auto parameters = module.named_parameters(/*recurse=*/false);
    for (const auto& buffer : module.named_buffers(/*recurse=*/false)) {
      if (!buffer.key().ends_with(suffix)) {
        continue;
      }
      const std::string parameter = buffer.key().substr(0, buffer.key().size() - suffix.size());
      const std::string name = path.empty() ? parameter : path + "." + parameter;
      const auto* value = parameters.find(parameter);
      TORCH_CHECK_VALUE(value != nullptr && value->defined(), "[masked_parameters] the mask '", mask_key(name),
                        "' must be beside a parameter '", parameter, "', but its module has none");
      state.parameters.push_back({name, *value, buffer.value()});
    }
  };
  visit("", model);
  for (const auto& child : model.named_modules("", /*include_self=*/false)) {
    visit(child.key(), *child.value());
  }
  return state;
}

void check_masks(const PruningState& state, const char* function) {
  const auto stray = stray_values(state);
  TORCH_CHECK_VALUE(
      stray.empty(), "[", function, "] '", stray[0].parameter, "' must be zero where its mask prunes, but ",
      stray[0].count, stray[0].count == 1 ? " value is not, at flat index " : " values are not, the first at flat index ",
      stray[0].first,
      stray.size() == 1 ? std::string() : fmt::format(", and so in {} more of its parameters", stray.size() - 1),
      ". Something wrote weights after the masks were applied: let the pruner step after the optimizer, or call remask() "
      "where weights were merged, averaged or loaded");
}

void check_masks(const torch::nn::Module& model, const char* function) {
  check_masks(masked_parameters(model), function);
}

void remove_masks(torch::nn::Module& model) {
  const auto clear = [](torch::nn::Module& module) {
    for (const auto& buffer : module.named_buffers(/*recurse=*/false)) {
      if (is_beside_parameter(buffer.key())) {
        unregister_buffer(module, buffer.key());
      }
    }
  };
  clear(model);
  for (const auto& child : model.named_modules("", /*include_self=*/false)) {
    clear(*child.value());
  }
  if (model.named_buffers(/*recurse=*/false).contains(kStepKey)) {
    unregister_buffer(model, kStepKey);
  }
}

int64_t remask(torch::nn::Module& model) {
  const auto state = masked_parameters(model);
  int64_t count = 0;
  for (const auto& stray : stray_values(state)) {
    count += stray.count;
  }
  if (count > 0) {
    apply_values(state);
  }
  return count;
}

}  // namespace rarefy::pruning
