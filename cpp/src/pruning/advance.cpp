// One step of a pruner. Everything is computed before anything is written, so that a step that throws changes nothing.
#include <ATen/core/grad_mode.h>
#include <ATen/ops/full_like.h>
#include <c10/util/Exception.h>
#include <rarefy/ops/mask.h>
#include <rarefy/pruning/element_score.h>
#include <rarefy/pruning/enforce.h>
#include <rarefy/pruning/state.h>

#include <algorithm>
#include <cmath>
#include <limits>

#include "pruning/state_checks.h"

namespace rarefy::pruning {
namespace {

using Masks = std::vector<at::Tensor>;

int64_t next_step(const PruningState& state) { return state.step.item<int64_t>() + 1; }

/// The step of the schedule whose update is made at `step`; -1 without one. Nothing runs before the first optimizer step,
/// so an update that is due at 0 is made at 1, with the sparsity of 0.
int64_t due_at(const Schedule& schedule, int64_t step) {
  return updates_at(schedule, step) ? step : step == 1 && updates_at(schedule, 0) ? 0 : -1;
}

const StraightThrough* soft_of(const PrunerOptions& options) {
  return options.regrowth.has_value() ? std::get_if<StraightThrough>(&*options.regrowth) : nullptr;
}

/// Soft masks at this step: the optimizer has worked on dense weights.
bool is_soft_at(const PrunerOptions& options, int64_t step) {
  const auto* soft = soft_of(options);
  return soft != nullptr && step <= soft->end;
}

/// The fraction of kept weights that SET or RigL exchanges at this step; 0 for none.
double exchange_at(const PrunerOptions& options, int64_t step) {
  if (!options.regrowth.has_value()) {
    return 0.0;
  }
  return std::visit(
      [&](const auto& regrowth) {
        if constexpr (requires { regrowth.fraction_at(step); }) {
          return regrowth.updates_at(step) ? regrowth.fraction_at(step) : 0.0;
        } else {
          return 0.0;
        }
      },
      *options.regrowth);
}

bool rewinds_at(const PrunerOptions& options, int64_t step) {
  const auto* iterative = std::get_if<Iterative>(&options.schedule);
  return iterative != nullptr && iterative->rewind != Rewind::none && iterative->updates_at(step);
}

/// What decides which elements of a parameter are kept; undefined: |value|.
at::Tensor score_of(const PrunerOptions& options, const MaskedParameter& parameter) {
  if (options.scores.has_value()) {
    return parameter.score;
  }
  const auto* magnitude = std::get_if<Magnitude>(&options.criterion);
  const bool is_elementwise =
      std::holds_alternative<Unstructured>(options.pattern) || std::holds_alternative<NM>(options.pattern);
  if (magnitude != nullptr && (magnitude->p == 1.0 || is_elementwise)) {
    return {};  // any power has the same order
  }
  return element_scores(options.criterion, parameter.name, parameter.value, parameter.score);
}

Masks masks_of(const PruningState& state) {
  Masks masks;
  for (const auto& parameter : state.parameters) {
    masks.push_back(parameter.mask);
  }
  return masks;
}

Masks choose(const PruningState& state, const PrunerOptions& options, int64_t due, bool regrow) {
  MaskChoice choice{.sparsity = sparsity_at(options.schedule, due, options.sparsity),
                    .scope = options.scope,
                    .pattern = options.pattern,
                    .layers = options.layers,
                    .regrow = regrow};
  for (auto& layer : choice.layers) {
    layer.second = sparsity_at(options.schedule, due, layer.second);
  }
  std::vector<Candidate> candidates;
  for (const auto& parameter : state.parameters) {
    candidates.push_back({parameter.name, parameter.value, score_of(options, parameter), parameter.mask});
  }
  return choose_masks(candidates, choice);
}

/// Mixes the step into a seed (the finalizer of SplitMix64, Steele et al., 2014).
uint64_t mixed(uint64_t seed, int64_t step) {
  uint64_t x = seed + 0x9e3779b97f4a7c15u * static_cast<uint64_t>(step);
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9u;
  x = (x ^ (x >> 27)) * 0x94d049bb133111ebu;
  return x ^ (x >> 31);
}

/// The dense gradient that RigL grows by.
at::Tensor growth_gradient(const MaskedParameter& parameter) {
  auto gradient = parameter.growth.defined() ? parameter.growth : parameter.value.grad();
  TORCH_CHECK_VALUE(gradient.defined(), "[Pruner.step] RigL needs the gradient of '", parameter.name,
                    "' at this step, got none: call step() after the backward pass and before zero_grad()");
  gradient = gradient.layout() == at::kStrided ? gradient : gradient.to_dense();
  TORCH_CHECK_VALUE(gradient.isfinite().all().item<bool>(),
                    "[Pruner.step] RigL needs finite gradients, got others for '", parameter.name, "'");
  return gradient.abs();
}

at::Tensor growth_score(const PrunerOptions& options, const MaskedParameter& parameter, int64_t step) {
  if (const auto* set = std::get_if<SET>(&*options.regrowth)) {
    return element_scores(Random{mixed(set->seed, step)}, parameter.name, parameter.value);
  }
  return growth_gradient(parameter);
}

/// `mask` with a fraction of its kept elements exchanged for pruned ones; as many are kept as before.
at::Tensor exchange(const PrunerOptions& options, const MaskedParameter& parameter, const at::Tensor& mask,
                    double fraction, int64_t step) {
  const int64_t elements = parameter.value.numel();
  const int64_t pruned = ops::pruned_count(mask, elements), kept = elements - pruned;
  const auto count = std::min(static_cast<int64_t>(std::nearbyint(fraction * static_cast<double>(kept))), kept - 1);
  if (pruned == 0 || count <= 0) {
    return mask;
  }
  const auto part = [&](int64_t number) {
    return MaskChoice{.sparsity = static_cast<double>(number) / static_cast<double>(elements),
                      .scope = Scope::local,
                      .pattern = options.pattern};
  };
  const auto left =
      choose_masks({{parameter.name, parameter.value, score_of(options, parameter), mask}}, part(pruned + count))[0];
  const auto type = parameter.value.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
  auto kept_score = at::full_like(parameter.value, std::numeric_limits<double>::infinity(), type);
  ops::apply_mask_(kept_score, left);
  auto score = growth_score(options, parameter, step).to(type, false, /*copy=*/true);
  ops::apply_mask_(score, left.bitwise_not());
  return choose_masks({{parameter.name, parameter.value, kept_score.add_(score), {}}}, part(pruned))[0];
}

/// Soft masks: what is pruned goes on learning beside the values, which become those of the next forward pass.
void hide(const PruningState& state) {
  for (const auto& parameter : state.parameters) {
    at::Tensor value = parameter.value, latent = parameter.latent;
    latent.copy_(value);
    ops::apply_mask_(latent, parameter.mask.bitwise_not());
    ops::apply_mask_(value, parameter.mask);
  }
}

}  // namespace

bool needs_accumulate(const PruningState& state, const PrunerOptions& options) {
  const int64_t step = next_step(state);
  if (is_soft_at(options, step)) {
    return true;
  }
  if (!needs_gradients(options.criterion) || options.scores.has_value()) {
    return false;
  }
  int64_t last = last_update(options.schedule);
  last = last == 0 ? 1 : last;  // an update that is due at 0 is made at 1
  if (options.regrowth.has_value()) {
    last = std::max(last, std::visit([](const auto& regrowth) { return regrowth.end; }, *options.regrowth));
  }
  return step <= last;
}

bool needs_growth(const PruningState& state, const PrunerOptions& options) {
  return options.regrowth.has_value() && std::holds_alternative<RigL>(*options.regrowth) &&
         exchange_at(options, next_step(state)) > 0.0;
}

bool may_regrow(const PruningState& state, const PrunerOptions& options) {
  const int64_t step = next_step(state);
  return exchange_at(options, step) > 0.0 || releases_at(options.schedule, step);
}

bool is_soft(const PruningState& state, const PrunerOptions& options) { return is_soft_at(options, next_step(state)); }

int64_t training_step(const PrunerOptions& options, int64_t step) {
  const auto* iterative = std::get_if<Iterative>(&options.schedule);
  return iterative == nullptr ? step : iterative->training_step(step);
}

void accumulate_gradients(PruningState& state, const PrunerOptions& options) {
  check_state(state);
  check_kept(state, options);
  if (!needs_accumulate(state, options)) {
    return;
  }
  const at::NoGradGuard no_grad;
  const auto* soft = is_soft(state, options) ? soft_of(options) : nullptr;
  const bool is_scored = needs_gradients(options.criterion) && !options.scores.has_value();
  std::vector<at::Tensor> gradients, scores;
  bool has_gradient = false;
  for (const auto& parameter : state.parameters) {
    const auto& gradient = parameter.value.grad();
    gradients.push_back(!gradient.defined() || gradient.layout() == at::kStrided ? gradient : gradient.to_dense());
    has_gradient = has_gradient || gradient.defined();
  }
  TORCH_CHECK_VALUE(has_gradient,
                    "[Pruner.accumulate] needs gradients of the pruned parameters, got none: call it after ",
                    "the backward pass and before optimizer.step()");
  for (size_t i = 0; i < gradients.size(); ++i) {
    TORCH_CHECK_VALUE(soft == nullptr || soft->decay == 0.0 || !gradients[i].defined() ||
                          gradients[i].is_same(state.parameters[i].value.grad()),
                      "[Pruner.accumulate] the decay of StraightThrough needs dense gradients, got a sparse one for '",
                      state.parameters[i].name, "'");
  }
  if (is_scored) {
    for (size_t i = 0; i < gradients.size(); ++i) {
      const auto& parameter = state.parameters[i];
      auto score = parameter.score;
      if (gradients[i].defined()) {  // without one the parameter took no part in this pass, which adds nothing
        score = score.clone();
        const auto dense = soft == nullptr ? parameter.value : parameter.value.add(parameter.latent);
        accumulate(options.criterion, dense, gradients[i], score);
      }
      scores.push_back(score);
    }
  }
  for (size_t i = 0; i < gradients.size(); ++i) {
    auto& parameter = state.parameters[i];
    if (is_scored) {
      parameter.score.copy_(scores[i]);
    }
    if (soft != nullptr) {
      parameter.value.add_(parameter.latent);  // one of the two is 0
      if (soft->decay > 0.0 && gradients[i].defined()) {
        gradients[i].add_(parameter.latent, soft->decay);
      }
      parameter.latent.zero_();  // a second call changes nothing
    }
  }
}

StepResult update_masks(PruningState& state, const PrunerOptions& options) {
  check_state(state);
  check_kept(state, options);
  const at::NoGradGuard no_grad;
  const int64_t step = next_step(state);
  const bool soft = is_soft_at(options, step);
  int64_t due = due_at(options.schedule, step);
  if (soft && due < 0 && soft_of(options)->updates_at(step)) {
    due = step;
  }
  const bool releases = !soft && due >= 0 && releases_at(options.schedule, due);
  const double fraction = exchange_at(options, step);
  const bool rewinds = rewinds_at(options, step);

  Masks masks;
  if (due >= 0) {
    masks = choose(state, options, due, releases || soft);
  }
  if (fraction > 0.0) {
    masks = masks.empty() ? masks_of(state) : masks;
    for (size_t i = 0; i < masks.size(); ++i) {
      masks[i] = exchange(options, state.parameters[i], masks[i], fraction, step);
    }
  }

  if (releases || fraction > 0.0) {  // what comes back starts at 0, whatever the optimizer made of it in this step
    for (auto& parameter : state.parameters) {
      ops::apply_mask_(parameter.value, parameter.mask);
    }
  }
  for (size_t i = 0; i < masks.size(); ++i) {
    state.parameters[i].mask.copy_(masks[i]);
  }
  if (soft) {
    hide(state);
    if (step == soft_of(options)->end) {
      for (auto& parameter : state.parameters) {
        parameter.latent.zero_();
      }
    }
  }
  const auto* iterative = std::get_if<Iterative>(&options.schedule);
  for (auto& snapshot : state.snapshots) {
    if (rewinds) {
      snapshot.value.copy_(snapshot.saved);
    } else if (step == iterative->rewind_to) {
      snapshot.saved.copy_(snapshot.value);
    }
  }
  state.step.fill_(step);
  return {!masks.empty() || rewinds, rewinds};
}

StepResult advance(PruningState& state, const PrunerOptions& options) {
  const auto result = update_masks(state, options);
  apply_values(state);  // gradients are spent by now
  return result;
}

}  // namespace rarefy::pruning
