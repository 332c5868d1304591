#include <ATen/core/grad_mode.h>
#include <ATen/ops/zeros.h>
#include <fmt/format.h>
#include <rarefy/ops/mask.h>
#include <rarefy/pruning/enforce.h>
#include <rarefy/pruning/pruner.h>
#include <rarefy/pruning/sparse_report.h>
#include <torch/optim/optimizer.h>

#include <set>

#include "pruning/module_buffers.h"

namespace rarefy::pruning {
namespace {

struct Owned {
  std::string path;                          // of the module, "" or with a dot at its end
  std::shared_ptr<torch::nn::Module> owner;  // null for the model itself
  torch::nn::Module* module;
  std::string key;
  at::Tensor value;

  std::string name() const { return path + key; }
};

/// The parameters, the other tensors that rewinding sets back, and the keys of pruning that a model has.
struct Inventory {
  std::vector<Owned> parameters;
  std::vector<Owned> buffers;
  std::vector<std::string> existing;

  explicit Inventory(torch::nn::Module& model) {
    visit("", nullptr, model);
    for (const auto& child : model.named_modules("", /*include_self=*/false)) {
      visit(child.key() + ".", child.value(), *child.value());
    }
  }

  std::vector<NamedParameter> named_parameters() const {
    std::vector<NamedParameter> out;
    for (const auto& parameter : parameters) {
      out.push_back({parameter.name(), parameter.value});
    }
    return out;
  }

 private:
  void visit(const std::string& path, const std::shared_ptr<torch::nn::Module>& owner, torch::nn::Module& module) {
    const bool is_new = visited_.insert(&module).second;  // a module that is registered twice counts by its first path
    for (const auto& parameter : module.named_parameters(/*recurse=*/false)) {
      if (parameter.value().defined()) {
        parameters.push_back({path, owner, &module, parameter.key(), parameter.value()});
      }
    }
    for (const auto& buffer : module.named_buffers(/*recurse=*/false)) {
      if (!is_new) {
        continue;
      }
      // Another model's counter inside this one stays what it is: only this model's own is ours.
      if (is_pruning_key(buffer.key())) {
        if (path.empty() || buffer.key() != kStepKey) {
          existing.push_back(path + buffer.key());
        }
      } else if (buffer.value().defined()) {
        buffers.push_back({path, owner, &module, buffer.key(), buffer.value()});
      }
    }
  }

  std::set<const torch::nn::Module*> visited_;
};

/// A buffer that a pruner makes, where it goes.
struct NewBuffer {
  const Owned* of;  // null for the counter
  std::string key;  // within the module
  at::Tensor value;
};

void put(MaskedParameter& parameter, const std::string& key, const at::Tensor& value) {
  at::Tensor& slot = key == mask_key(parameter.name)    ? parameter.mask
                     : key == score_key(parameter.name) ? parameter.score
                                                        : parameter.latent;
  slot = value;
}

std::string criterion_text(const PrunerOptions& options) {
  return options.scores.has_value() ? "given scores" : to_string(options.criterion);
}

PrunerOptions checked(PrunerOptions options) {
  options.validate();
  return options;
}

/// Scores are copied to buffers; the map stays, empty, for what it says of the criterion.
void forget_scores(PrunerOptions& options) {
  if (options.scores.has_value()) {
    options.scores->clear();
  }
}

PrunerOptions by_magnitude(PrunerOptions options) {
  TORCH_CHECK_VALUE(std::holds_alternative<Magnitude>(options.criterion) && !options.scores.has_value(),
                    "[MagnitudePruner] the criterion must be Magnitude, got ", criterion_text(options),
                    "; Pruner has all of them");
  return options;
}

}  // namespace

Pruner::Pruner(torch::nn::Module& model, PrunerOptions options) : options_(checked(std::move(options))) {
  const Inventory inventory(model);
  const auto named = inventory.named_parameters();
  auto selection = select_parameters(named, options_.include, options_.exclude);
  left_alone_ = std::move(selection.left_alone);

  std::vector<std::string> names, others;
  for (const size_t i : selection.chosen) {
    names.push_back(named[i].name);
  }
  check_names(options_, names);
  std::vector<NewBuffer> made;
  for (const size_t i : selection.chosen) {
    const auto& parameter = inventory.parameters[i];
    for (auto& [key, value] : new_buffers(options_, parameter.name(), parameter.value)) {
      if (key != mask_key(parameter.name())) {
        others.push_back(key);
      }
      made.push_back({&parameter, key.substr(parameter.path.size()), std::move(value)});
    }
    state_.parameters.push_back({parameter.name(), parameter.value, {}});
  }
  if (keeps_snapshots(options_)) {
    std::set<const c10::TensorImpl*> seen;
    const at::NoGradGuard no_grad;
    for (const auto* group : {&inventory.parameters, &inventory.buffers}) {
      for (const auto& tensor : *group) {
        if (seen.insert(tensor.value.unsafeGetTensorImpl()).second) {
          others.push_back(rewind_key(tensor.name()));
          made.push_back({&tensor, rewind_key(tensor.key), tensor.value.detach().clone()});
          state_.snapshots.push_back({tensor.name(), tensor.value, {}});
        }
      }
    }
  }
  const bool continues = check_existing(inventory.existing, names, others);

  size_t parameter = 0, snapshot = 0;
  for (const auto& [of, key, value] : made) {
    auto& module = *of->module;
    const auto buffer = continues ? module.named_buffers(false)[key] : module.register_buffer(key, value);
    places_.push_back({of->owner, of->module, key});
    if (key == rewind_key(of->key)) {
      state_.snapshots[snapshot++].saved = buffer;
    } else {
      parameter += state_.parameters[parameter].name == of->name() ? 0 : 1;
      put(state_.parameters[parameter], of->path + key, buffer);
    }
  }
  state_.step =
      continues ? model.named_buffers(false)[kStepKey] : model.register_buffer(kStepKey, at::zeros({}, at::kLong));
  places_.push_back({nullptr, &model, kStepKey});
  forget_scores(options_);
}

Pruner::Pruner(const std::vector<NamedParameter>& parameters, PrunerOptions options)
    : options_(checked(std::move(options))) {
  TORCH_CHECK_VALUE(
      !options_.include.has_value() && options_.exclude.empty(),
      "[Pruner] include and exclude must be unset for an explicit list of parameters, which is the selection "
      "itself");
  std::vector<std::string> names;
  for (const auto& parameter : parameters) {
    TORCH_CHECK_VALUE(parameter.value.defined() && parameter.value.is_floating_point(),
                      "[Pruner] parameters must be floating point, got '", parameter.name, "'");
    names.push_back(parameter.name);
  }
  auto selection = select_parameters(parameters, names, {});
  left_alone_ = std::move(selection.left_alone);
  names.clear();
  for (const size_t i : selection.chosen) {
    names.push_back(parameters[i].name);
  }
  check_names(options_, names);
  const at::NoGradGuard no_grad;
  for (const size_t i : selection.chosen) {
    const auto& [name, value] = parameters[i];
    state_.parameters.push_back({name, value, {}});
    for (const auto& [key, buffer] : new_buffers(options_, name, value)) {
      put(state_.parameters.back(), key, buffer);
    }
    if (keeps_snapshots(options_)) {
      state_.snapshots.push_back({name, value, value.detach().clone()});
    }
  }
  state_.step = at::zeros({}, at::kLong);
  forget_scores(options_);
}

Pruner Pruner::from_masks(torch::nn::Module& model, const std::map<std::string, at::Tensor>& masks) {
  TORCH_CHECK_VALUE(!masks.empty(), "[Pruner.from_masks] needs at least one mask, got none");
  const Inventory inventory(model);
  TORCH_CHECK_VALUE(inventory.existing.empty(), "[Pruner.from_masks] the model must have no masks yet, got '",
                    inventory.existing.empty() ? "" : inventory.existing.front(), "'; finalize() its pruner first");
  std::vector<std::string> names;
  std::vector<at::Tensor> values;
  std::map<std::string, at::Tensor> by_name;
  for (const auto& parameter : inventory.parameters) {
    by_name.emplace(parameter.name(), parameter.value);
  }
  for (const auto& [name, mask] : masks) {
    const auto found = by_name.find(name);
    TORCH_CHECK_VALUE(found != by_name.end(), "[Pruner.from_masks] every name must be that of a parameter, got '", name,
                      "'");
    names.push_back(name);
    values.push_back(found->second);
  }
  const auto packed = pack_masks(names, values, masks);
  int64_t elements = 0, pruned = 0;
  for (size_t i = 0; i < packed.size(); ++i) {
    elements += values[i].numel();
    pruned += ops::pruned_count(packed[i], values[i].numel());
  }
  TORCH_CHECK_VALUE(pruned < elements || elements == 0, "[Pruner.from_masks] masks must keep something, got none kept");
  const double sparsity = elements == 0 ? 0.0 : static_cast<double>(pruned) / static_cast<double>(elements);
  Pruner pruner(model, {.sparsity = sparsity, .schedule = FixedSchedule{}, .include = names});
  for (auto& parameter : pruner.state_.parameters) {
    const auto at = std::find(names.begin(), names.end(), parameter.name) - names.begin();
    parameter.mask.copy_(packed[static_cast<size_t>(at)]);
  }
  apply_masks(pruner.state_);
  return pruner;
}

void Pruner::check_active(const char* function) const {
  TORCH_CHECK(!final_report_.has_value(), "[Pruner.", function, "] must not be called after finalize()");
}

void Pruner::check_accumulated() const {
  TORCH_CHECK(accumulated_ || !needs_accumulate(),
              "[Pruner.step] needs accumulate() between the backward pass and "
              "optimizer.step() for ",
              is_soft(state_, options_) ? "soft masks" : criterion_text(options_));
}

bool Pruner::needs_accumulate() const {
  return !final_report_.has_value() && pruning::needs_accumulate(state_, options_);
}

void Pruner::accumulate() {
  check_active("accumulate");
  TORCH_CHECK(!accumulated_, "[Pruner.accumulate] must be called once per step(), after the last backward pass");
  accumulate_gradients(state_, options_);
  accumulated_ = true;
}

void Pruner::step() {
  check_active("step");
  check_accumulated();
  finish_step(advance(state_, options_));
}

void Pruner::finish_step(const StepResult& result) {
  accumulated_ = false;
  rewound_ = result.rewound;
}

void Pruner::step(torch::optim::Optimizer& optimizer) {
  check_active("step");
  if (needs_accumulate() && !accumulated_) {
    accumulate();
  }
  const bool is_dense = is_soft(state_, options_);
  PruningState now = state_;
  if (needs_growth(state_, options_)) {
    for (auto& parameter : now.parameters) {
      const auto& gradient = parameter.value.grad();
      parameter.growth = gradient.defined() ? gradient.clone() : gradient;
    }
  }
  const bool regrows = may_regrow(state_, options_);
  bool stays_zero = false;
  if (!is_dense) {
    if (!is_clean(optimizer)) {
      enforce(state_, &optimizer);
    }
    stays_zero = mask_gradients(state_) && keeps_zeros(optimizer);
  }
  clean_.clear();
  optimizer.step();
  if (regrows && !stays_zero) {
    enforce(state_, &optimizer);
  }
  const auto result = update_masks(now, options_);
  if (result.rewound && keeps_snapshots(options_)) {
    optimizer.state().clear();
  }
  if (!is_soft(state_, options_)) {
    if (!stays_zero || result.updated) {
      enforce(state_, &optimizer);
    }
    clean_ = versions_of(state_, moments_of(state_, optimizer));
  }
  finish_step(result);
}

/// What no version tells is found by reading all values, once in a while.
bool Pruner::is_clean(const torch::optim::Optimizer& optimizer) const {
  constexpr int64_t kCheckEvery = 100;
  return !clean_.empty() && clean_ == versions_of(state_, moments_of(state_, optimizer)) &&
         ((steps() + 1) % kCheckEvery != 0 || stray_values(state_).empty());
}

void Pruner::finalize() {
  check_active("finalize");
  apply_masks(state_);
  auto report = make_report(state_, options_, left_alone_);
  report.finalized = true;
  final_report_ = std::move(report);
  for (const auto& place : places_) {
    unregister_buffer(*place.module, place.buffer);
  }
  places_.clear();
}

PruningReport Pruner::report() const {
  return final_report_.has_value() ? *final_report_ : make_report(state_, options_, left_alone_);
}

PruningReport Pruner::report(const SparseReport& measured) const {
  auto report = this->report();
  report.cost = {measured.file.dense_bytes,
                 measured.file.bytes,
                 measured.macs,
                 measured.effective_macs,
                 measured.dense_milliseconds / 1e3,
                 measured.sparse_milliseconds / 1e3};
  return report;
}

double Pruner::sparsity() const { return masked_fraction(state_); }

int64_t Pruner::steps() const { return state_.step.item<int64_t>(); }

int64_t Pruner::training_step() const { return pruning::training_step(options_, steps()); }

std::string Pruner::to_string() const {
  std::string regrowth;
  if (options_.regrowth.has_value()) {
    regrowth = std::visit([](const auto& kind) { return ", " + kind.to_string(); }, *options_.regrowth);
  }
  return fmt::format("Pruner({} tensors, {}, {}, {}, sparsity {:.4f} of {}, step {}, {}{})", state_.parameters.size(),
                     criterion_text(options_), short_name(options_.pattern), name(options_.scope), sparsity(),
                     options_.sparsity, steps(), pruning::to_string(options_.schedule), regrowth);
}

std::vector<std::pair<std::string, at::Tensor>> Pruner::buffers() const {
  std::vector<std::pair<std::string, at::Tensor>> out;
  for (const auto& parameter : state_.parameters) {
    out.emplace_back(mask_key(parameter.name), parameter.mask);
    if (parameter.score.defined()) {
      out.emplace_back(score_key(parameter.name), parameter.score);
    }
    if (parameter.latent.defined()) {
      out.emplace_back(latent_key(parameter.name), parameter.latent);
    }
  }
  for (const auto& snapshot : state_.snapshots) {
    out.emplace_back(rewind_key(snapshot.name), snapshot.saved);
  }
  out.emplace_back(kStepKey, state_.step);
  return out;
}

MagnitudePruner::MagnitudePruner(torch::nn::Module& model, PrunerOptions options)
    : Pruner(model, by_magnitude(std::move(options))) {}

MagnitudePruner::MagnitudePruner(const std::vector<NamedParameter>& parameters, PrunerOptions options)
    : Pruner(parameters, by_magnitude(std::move(options))) {}

}  // namespace rarefy::pruning
