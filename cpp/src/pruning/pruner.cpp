#include <ATen/ops/zeros.h>
#include <rarefy/ops/mask.h>
#include <rarefy/pruning/pruner.h>

#include <set>

#include "pruning/module_buffers.h"

namespace rarefy::pruning {
namespace {

struct Owned {
  std::shared_ptr<torch::nn::Module> owner;
  torch::nn::Module* module;
  std::string parameter;
};

bool is_pruning_key(const std::string& key) { return key == kStepKey || key.ends_with(mask_key("")); }

}  // namespace

MagnitudePruner::MagnitudePruner(torch::nn::Module& model, MagnitudePrunerOptions options)
    : options_(std::move(options)) {
  options_.validate();
  std::vector<NamedParameter> parameters;
  std::vector<Owned> owned;
  std::vector<std::string> existing;
  std::set<const torch::nn::Module*> visited;  // a module that is registered twice counts by its first path
  const auto visit = [&](const std::string& path, const std::shared_ptr<torch::nn::Module>& owner,
                         torch::nn::Module& module) {
    const bool is_new = visited.insert(&module).second;
    const std::string prefix = path.empty() ? "" : path + ".";
    for (const auto& parameter : module.named_parameters(/*recurse=*/false)) {
      if (parameter.value().defined()) {
        parameters.push_back({prefix + parameter.key(), parameter.value()});
        owned.push_back({owner, &module, parameter.key()});
      }
    }
    for (const auto& buffer : module.named_buffers(/*recurse=*/false)) {
      // Another model's counter inside this one stays what it is: only this model's own is ours.
      if (is_new && is_pruning_key(buffer.key()) && (path.empty() || buffer.key() != kStepKey)) {
        existing.push_back(prefix + buffer.key());
      }
    }
  };
  visit("", nullptr, model);
  for (const auto& child : model.named_modules("", /*include_self=*/false)) {
    visit(child.key(), child.value(), *child.value());
  }

  auto selection = select_parameters(parameters, options_.include, options_.exclude);
  left_alone_ = std::move(selection.left_alone);
  std::vector<std::string> names;
  for (const size_t i : selection.chosen) {
    names.push_back(parameters[i].name);
  }
  const bool continues = check_existing(existing, names);
  for (const size_t i : selection.chosen) {
    auto& [owner, module, parameter] = owned[i];
    const auto key = mask_key(parameter);
    const auto& value = parameters[i].value;
    const auto mask =
        continues ? module->named_buffers(false)[key] : module->register_buffer(key, ops::full_mask(value));
    state_.parameters.push_back({parameters[i].name, value, mask});
    places_.push_back({owner, module, key});
  }
  state_.step =
      continues ? model.named_buffers(false)[kStepKey] : model.register_buffer(kStepKey, at::zeros({}, at::kLong));
  places_.push_back({nullptr, &model, kStepKey});
}

MagnitudePruner::MagnitudePruner(const std::vector<NamedParameter>& parameters, MagnitudePrunerOptions options)
    : options_(std::move(options)) {
  options_.validate();
  TORCH_CHECK_VALUE(!options_.include.has_value() && options_.exclude.empty(),
                    "[MagnitudePruner] include and exclude must be unset for an explicit list of parameters, which is "
                    "the selection itself");
  std::vector<std::string> names;
  for (const auto& parameter : parameters) {
    TORCH_CHECK_VALUE(parameter.value.defined() && parameter.value.is_floating_point(),
                      "[MagnitudePruner] parameters must be floating point, got '", parameter.name, "'");
    names.push_back(parameter.name);
  }
  auto selection = select_parameters(parameters, names, {});
  left_alone_ = std::move(selection.left_alone);
  for (const size_t i : selection.chosen) {
    state_.parameters.push_back({parameters[i].name, parameters[i].value, ops::full_mask(parameters[i].value)});
  }
  state_.step = at::zeros({}, at::kLong);
}

void MagnitudePruner::check_active(const char* function) const {
  TORCH_CHECK(!final_report_.has_value(), "[MagnitudePruner.", function, "] must not be called after finalize()");
}

void MagnitudePruner::step() {
  check_active("step");
  advance(state_, options_);
}

void MagnitudePruner::finalize() {
  check_active("finalize");
  apply_masks(state_);
  final_report_ = make_report(state_, options_, left_alone_);
  final_report_->finalized = true;
  for (const auto& place : places_) {
    unregister_buffer(*place.module, place.buffer);
  }
  places_.clear();
}

PruningReport MagnitudePruner::report() const {
  return final_report_.has_value() ? *final_report_ : make_report(state_, options_, left_alone_);
}

double MagnitudePruner::sparsity() const { return masked_fraction(state_); }

int64_t MagnitudePruner::steps() const { return state_.step.item<int64_t>(); }

std::vector<std::pair<std::string, at::Tensor>> MagnitudePruner::buffers() const {
  std::vector<std::pair<std::string, at::Tensor>> out;
  for (const auto& parameter : state_.parameters) {
    out.emplace_back(mask_key(parameter.name), parameter.mask);
  }
  out.emplace_back(kStepKey, state_.step);
  return out;
}

}  // namespace rarefy::pruning
