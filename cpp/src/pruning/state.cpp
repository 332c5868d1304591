#include <ATen/core/grad_mode.h>
#include <c10/util/Exception.h>
#include <fmt/format.h>
#include <rarefy/ops/mask.h>
#include <rarefy/pruning/state.h>

#include <algorithm>
#include <set>

#include "ops/mask_checks.h"

namespace rarefy::pruning {
namespace {

void check_state(const PruningState& state) {
  for (const auto& [name, value, mask] : state.parameters) {
    TORCH_CHECK_VALUE(mask.defined() && mask.scalar_type() == at::kByte && mask.dim() == 1 &&
                          mask.numel() == ops::mask_bytes(value.numel()),
                      "[MagnitudePruner] the mask of '", name, "' must hold ", ops::mask_bytes(value.numel()),
                      " bytes (uint8) for shape ", value.sizes(), ", got ", mask.defined() ? mask.numel() : 0, " of ",
                      mask.scalar_type());
    TORCH_CHECK_VALUE(mask.device() == value.device(), "[MagnitudePruner] the mask of '", name,
                      "' must be on the parameter's device ", value.device(), ", got ", mask.device());
  }
  TORCH_CHECK_VALUE(state.step.defined() && state.step.scalar_type() == at::kLong && state.step.numel() == 1,
                    "[MagnitudePruner] ", kStepKey, " must be one int64, got ", state.step.numel(), " of ",
                    state.step.scalar_type());
  TORCH_CHECK_VALUE(state.step.item<int64_t>() >= 0, "[MagnitudePruner] ", kStepKey, " must not be negative, got ",
                    state.step.item<int64_t>());
}

std::vector<at::Tensor> next_masks(const PruningState& state, double sparsity, Scope scope) {
  std::vector<Candidate> candidates;
  for (const auto& [name, value, mask] : state.parameters) {
    candidates.push_back({name, value, {}, mask});
  }
  return choose_masks(candidates, {.sparsity = sparsity, .scope = scope});
}

}  // namespace

void MagnitudePrunerOptions::validate() const {
  TORCH_CHECK_VALUE(sparsity >= 0.0 && sparsity < 1.0, "[MagnitudePruner] sparsity must be in [0, 1), got ", sparsity);
  std::visit([](const auto& s) { s.validate(); }, schedule);
  if (const auto* polynomial = std::get_if<PolynomialSchedule>(&schedule)) {
    TORCH_CHECK_VALUE(polynomial->initial <= sparsity,
                      "[MagnitudePruner] sparsity must not be below the schedule's initial ", polynomial->initial,
                      ", got ", sparsity);
  }
}

std::string mask_key(const std::string& parameter) { return parameter + "_mask_bits"; }

bool check_existing(const std::vector<std::string>& existing, const std::vector<std::string>& parameters) {
  if (existing.empty()) {
    return false;
  }
  std::set<std::string> found(existing.begin(), existing.end());
  for (const auto& parameter : parameters) {
    TORCH_CHECK_VALUE(
        found.erase(mask_key(parameter)) == 1,
        "[MagnitudePruner] a model that has masks must have them for the parameters chosen, got none for '", parameter,
        "'; finalize() its pruner first, or choose the same parameters");
  }
  TORCH_CHECK_VALUE(found.erase(kStepKey) == 1, "[MagnitudePruner] a model that has masks must have ", kStepKey,
                    " too, got none");
  TORCH_CHECK_VALUE(
      found.empty(), "[MagnitudePruner] a model that has masks must have them for the parameters chosen only, got '",
      found.empty() ? "" : *found.begin(), "' too; finalize() its pruner first, or choose the same parameters");
  return true;
}

void apply_masks(const PruningState& state) {
  check_state(state);
  const at::NoGradGuard no_grad;
  for (const auto& [name, value, mask] : state.parameters) {
    at::Tensor target = value;
    ops::apply_mask_(target, mask);
    at::Tensor grad = value.grad();
    if (grad.defined() && grad.layout() == at::kStrided) {
      ops::apply_mask_(grad, mask);
    }
  }
}

void advance(PruningState& state, const MagnitudePrunerOptions& options) {
  check_state(state);
  const at::NoGradGuard no_grad;
  const int64_t step = state.step.item<int64_t>() + 1;
  const auto updates_at = [&](int64_t t) {
    return std::visit([&](const auto& schedule) { return schedule.updates_at(t); }, options.schedule);
  };
  // Nothing runs before the first optimizer step, so an update that is due at 0 is made at 1, with the sparsity of 0.
  const int64_t due = updates_at(step) ? step : step == 1 && updates_at(0) ? 0 : -1;
  if (due >= 0) {
    const double sparsity =
        std::visit([&](const auto& schedule) { return schedule.sparsity_at(due, options.sparsity); }, options.schedule);
    const auto masks = next_masks(state, sparsity, options.scope);  // throws before anything is written
    for (size_t i = 0; i < masks.size(); ++i) {
      state.parameters[i].mask.copy_(masks[i]);
    }
  }
  apply_masks(state);
  state.step.fill_(step);
}

double masked_fraction(const PruningState& state) {
  int64_t elements = 0, pruned = 0;
  for (const auto& parameter : state.parameters) {
    elements += parameter.value.numel();
    pruned += ops::pruned_count(parameter.mask, parameter.value.numel());
  }
  return elements == 0 ? 0.0 : static_cast<double>(pruned) / static_cast<double>(elements);
}

PruningReport make_report(const PruningState& state, const MagnitudePrunerOptions& options,
                          const std::vector<LeftAlone>& left_alone) {
  check_state(state);
  const at::NoGradGuard no_grad;
  PruningReport report;
  report.left_alone = left_alone;
  report.target = options.sparsity;
  report.step = state.step.item<int64_t>();
  for (const auto& [name, value, mask] : state.parameters) {
    PrunedTensor row;
    row.name = name;
    row.shape = value.sizes().vec();
    row.elements = value.numel();
    row.zeros = value.numel() - value.count_nonzero().item<int64_t>();
    row.pruned = ops::pruned_count(mask, value.numel());
    if (row.zeros < row.pruned) {
      row.note =
          fmt::format("{} pruned values are not zero: call step() after the optimizer's", row.pruned - row.zeros);
    } else if (row.pruned == row.elements) {
      row.note = "all of it is pruned";
    } else if (options.scope == Scope::local && options.sparsity > 0.0 &&
               ops::elements_to_prune(options.sparsity, row.elements) == 0) {
      row.note = fmt::format("too small: {} of {} elements rounds to none", options.sparsity, row.elements);
    }
    report.tensors.push_back(std::move(row));
  }
  return report;
}

}  // namespace rarefy::pruning
