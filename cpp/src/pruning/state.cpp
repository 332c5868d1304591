#include <ATen/core/grad_mode.h>
#include <ATen/ops/zeros_like.h>
#include <c10/util/Exception.h>
#include <c10/util/StringUtil.h>
#include <fmt/format.h>
#include <rarefy/ops/mask.h>
#include <rarefy/pruning/element_score.h>
#include <rarefy/pruning/pattern_check.h>
#include <rarefy/pruning/state.h>

#include <algorithm>
#include <set>

#include "ops/mask_checks.h"
#include "pruning/patterns.h"
#include "pruning/state_checks.h"

namespace rarefy::pruning {
namespace {

constexpr const char* kMaskSuffix = "_mask_bits";
constexpr const char* kScoreSuffix = "_mask_score";
constexpr const char* kLatentSuffix = "_mask_latent";
constexpr const char* kRewindSuffix = "_mask_rewind";

/// The schedule's own lower end, where it has one.
double initial_of(const Schedule& schedule) {
  return std::visit(
      [](const auto& s) {
        if constexpr (requires { s.initial; }) {
          return s.initial;
        } else {
          return 0.0;
        }
      },
      schedule);
}

void check_regrowth(const PrunerOptions& options) {
  std::visit([](const auto& regrowth) { regrowth.validate(); }, *options.regrowth);
  if (const auto* soft = std::get_if<StraightThrough>(&*options.regrowth)) {
    TORCH_CHECK_VALUE(soft->end >= last_update(options.schedule),
                      "[Pruner] StraightThrough must not end before the schedule's last update at ",
                      last_update(options.schedule), ", got end ", soft->end);
    TORCH_CHECK_VALUE(!keeps_snapshots(options),
                      "[Pruner] StraightThrough must not be combined with the rewinding of weights");
    TORCH_CHECK_VALUE(!std::holds_alternative<FixedSchedule>(options.schedule),
                      "[Pruner] StraightThrough must not be combined with FixedSchedule, whose masks do not change");
  } else {
    TORCH_CHECK_VALUE(!std::holds_alternative<NM>(options.pattern),
                      "[Pruner] SET and RigL must have a pattern whose sparsity can rise, got ",
                      short_name(options.pattern), "; StraightThrough regrows weights in N:M");
  }
}

void check_like(const at::Tensor& kept, const std::string& key, const at::Tensor& value) {
  TORCH_CHECK_VALUE(kept.defined() && kept.sizes() == value.sizes() && kept.device() == value.device(), "[Pruner] '",
                    key, "' must have shape ", value.sizes(), " on ", value.device(), ", got ",
                    kept.defined() ? c10::str(kept.sizes(), " on ", kept.device()) : std::string("none"));
}

}  // namespace

void PrunerOptions::validate() const {
  TORCH_CHECK_VALUE(sparsity >= 0.0 && sparsity < 1.0, "[Pruner] sparsity must be in [0, 1), got ", sparsity);
  pruning::validate(schedule);
  const double initial = initial_of(schedule);
  TORCH_CHECK_VALUE(initial <= sparsity, "[Pruner] sparsity must not be below the schedule's initial ", initial,
                    ", got ", sparsity);
  pruning::validate(criterion);
  MaskChoice{.sparsity = sparsity, .scope = scope, .pattern = pattern, .layers = layers}.validate();
  for (const auto& [pattern_of, own] : layers) {
    TORCH_CHECK_VALUE(initial <= own, "[Pruner] the sparsity of '", pattern_of,
                      "' must not be below the schedule's initial ", initial, ", got ", own);
  }
  TORCH_CHECK_VALUE(scores.has_value() || !std::holds_alternative<Activation>(criterion),
                    "[Pruner] Activation needs statistics: compute scores with them and give those");
  if (regrowth.has_value()) {
    check_regrowth(*this);
  }
}

std::string mask_key(const std::string& parameter) { return parameter + kMaskSuffix; }
std::string score_key(const std::string& parameter) { return parameter + kScoreSuffix; }
std::string latent_key(const std::string& parameter) { return parameter + kLatentSuffix; }
std::string rewind_key(const std::string& tensor) { return tensor + kRewindSuffix; }

bool is_pruning_key(const std::string& key) {
  return key == kStepKey || key.ends_with(kMaskSuffix) || key.ends_with(kScoreSuffix) || key.ends_with(kLatentSuffix) ||
         key.ends_with(kRewindSuffix);
}

bool keeps_scores(const PrunerOptions& options) {
  return options.scores.has_value() || needs_gradients(options.criterion);
}

bool keeps_latent(const PrunerOptions& options) {
  return options.regrowth.has_value() && std::holds_alternative<StraightThrough>(*options.regrowth);
}

bool keeps_snapshots(const PrunerOptions& options) {
  const auto* iterative = std::get_if<Iterative>(&options.schedule);
  return iterative != nullptr && iterative->rewind == Rewind::weights;
}

std::vector<std::pair<std::string, at::Tensor>> new_buffers(const PrunerOptions& options, const std::string& name,
                                                            const at::Tensor& value) {
  const auto problem = misfit(options.pattern, value.sizes());
  TORCH_CHECK_VALUE(problem.empty(), "[Pruner] '", name, "' cannot have the pattern: ", problem);
  const at::NoGradGuard no_grad;
  std::vector<std::pair<std::string, at::Tensor>> out{{mask_key(name), ops::full_mask(value)}};
  if (options.scores.has_value()) {
    const auto& score = options.scores->at(name);
    TORCH_CHECK_VALUE(score.sizes() == value.sizes() && score.is_floating_point(), "[Pruner] the scores of '", name,
                      "' must be floating point of shape ", value.sizes(), ", got ", score.scalar_type(), " of ",
                      score.sizes());
    out.emplace_back(score_key(name), score.detach().to(value.device(), score.scalar_type(), false, /*copy=*/true));
  } else if (keeps_scores(options)) {
    out.emplace_back(score_key(name), new_accumulator(value));
  }
  if (keeps_latent(options)) {
    out.emplace_back(latent_key(name), at::zeros_like(value.detach()));
  }
  return out;
}

void check_names(const PrunerOptions& options, const std::vector<std::string>& parameters) {
  if (options.scores.has_value()) {
    for (const auto& name : parameters) {
      TORCH_CHECK_VALUE(options.scores->count(name) == 1,
                        "[Pruner] scores must be given for all parameters that are pruned, got none for '", name, "'");
    }
    for (const auto& [name, score] : *options.scores) {
      TORCH_CHECK_VALUE(std::find(parameters.begin(), parameters.end(), name) != parameters.end(),
                        "[Pruner] scores must be those of parameters that are pruned, got '", name, "'");
    }
  }
  for (const auto& layer : options.layers) {
    TORCH_CHECK_VALUE(
        std::any_of(parameters.begin(), parameters.end(),
                    [&](const auto& name) { return matches_parameter(layer.first, name); }),
        "[Pruner] every name in layers must be that of a parameter that is pruned or of its module, got '", layer.first,
        "'");
  }
}

bool check_existing(const std::vector<std::string>& existing, const std::vector<std::string>& parameters,
                    const std::vector<std::string>& others) {
  if (existing.empty()) {
    return false;
  }
  std::set<std::string> found(existing.begin(), existing.end());
  for (const auto& parameter : parameters) {
    TORCH_CHECK_VALUE(found.erase(mask_key(parameter)) == 1,
                      "[Pruner] a model that has masks must have them for the parameters chosen, got none for '",
                      parameter, "'; finalize() its pruner first, or choose the same parameters");
  }
  TORCH_CHECK_VALUE(found.erase(kStepKey) == 1, "[Pruner] a model that has masks must have ", kStepKey,
                    " too, got none");
  for (const auto& key : others) {
    TORCH_CHECK_VALUE(found.erase(key) == 1, "[Pruner] a model that has masks must have '", key,
                      "' too for these options, got none; finalize() its pruner first, or use its options");
  }
  TORCH_CHECK_VALUE(found.empty(),
                    "[Pruner] a model that has masks must have them for the parameters chosen only, got '",
                    found.empty() ? "" : *found.begin(),
                    "' too; finalize() its pruner first, or choose the same parameters and options");
  return true;
}

void check_state(const PruningState& state) {
  for (const auto& parameter : state.parameters) {
    const auto& [name, value, mask] = std::tie(parameter.name, parameter.value, parameter.mask);
    TORCH_CHECK_VALUE(mask.defined() && mask.scalar_type() == at::kByte && mask.dim() == 1 &&
                          mask.numel() == ops::mask_bytes(value.numel()),
                      "[Pruner] the mask of '", name, "' must hold ", ops::mask_bytes(value.numel()),
                      " bytes (uint8) for shape ", value.sizes(), ", got ", mask.defined() ? mask.numel() : 0, " of ",
                      mask.scalar_type());
    TORCH_CHECK_VALUE(mask.device() == value.device(), "[Pruner] the mask of '", name,
                      "' must be on the parameter's device ", value.device(), ", got ", mask.device());
  }
  TORCH_CHECK_VALUE(state.step.defined() && state.step.scalar_type() == at::kLong && state.step.numel() == 1,
                    "[Pruner] ", kStepKey, " must be one int64, got ", state.step.numel(), " of ",
                    state.step.scalar_type());
  TORCH_CHECK_VALUE(state.step.item<int64_t>() >= 0, "[Pruner] ", kStepKey, " must not be negative, got ",
                    state.step.item<int64_t>());
}

void check_kept(const PruningState& state, const PrunerOptions& options) {
  for (const auto& parameter : state.parameters) {
    if (keeps_scores(options)) {
      check_like(parameter.score, score_key(parameter.name), parameter.value);
    }
    if (keeps_latent(options)) {
      check_like(parameter.latent, latent_key(parameter.name), parameter.value);
    }
  }
  for (const auto& snapshot : state.snapshots) {
    check_like(snapshot.saved, rewind_key(snapshot.name), snapshot.value);
  }
}

std::vector<at::Tensor> pack_masks(const std::vector<std::string>& names, const std::vector<at::Tensor>& values,
                                   const std::map<std::string, at::Tensor>& masks) {
  std::vector<at::Tensor> out;
  for (size_t i = 0; i < names.size(); ++i) {
    const auto found = masks.find(names[i]);
    TORCH_CHECK_VALUE(found != masks.end(), "[Pruner.from_masks] needs a mask for '", names[i], "', got none");
    const auto& mask = found->second;
    const int64_t bytes = ops::mask_bytes(values[i].numel());
    const bool is_packed = mask.scalar_type() == at::kByte;
    TORCH_CHECK_TYPE(is_packed || mask.scalar_type() == at::kBool, "[Pruner.from_masks] the mask of '", names[i],
                     "' must be bool, or uint8 where it is packed, got ", mask.scalar_type());
    TORCH_CHECK_VALUE(is_packed ? mask.dim() == 1 && mask.numel() == bytes : mask.sizes() == values[i].sizes(),
                      "[Pruner.from_masks] the mask of '", names[i], "' must be bool of shape ", values[i].sizes(),
                      " or ", bytes, " bytes (uint8), got ", mask.scalar_type(), " of ", mask.sizes());
    const auto placed = mask.to(values[i].device());
    out.push_back(is_packed ? ops::pack_mask(ops::unpack_mask(placed, values[i].sizes())) : ops::pack_mask(placed));
  }
  return out;
}

double masked_fraction(const PruningState& state) {
  int64_t elements = 0, pruned = 0;
  for (const auto& parameter : state.parameters) {
    elements += parameter.value.numel();
    pruned += ops::pruned_count(parameter.mask, parameter.value.numel());
  }
  return elements == 0 ? 0.0 : static_cast<double>(pruned) / static_cast<double>(elements);
}

PruningReport make_report(const PruningState& state, const PrunerOptions& options,
                          const std::vector<LeftAlone>& left_alone) {
  check_state(state);
  const at::NoGradGuard no_grad;
  PruningReport report;
  report.left_alone = left_alone;
  report.target = options.sparsity;
  report.step = state.step.item<int64_t>();
  report.pattern = short_name(options.pattern);
  const bool is_structured = !std::holds_alternative<Unstructured>(options.pattern);
  for (const auto& parameter : state.parameters) {
    const auto& value = parameter.value;
    PrunedTensor row;
    row.name = parameter.name;
    row.shape = value.sizes().vec();
    row.elements = value.numel();
    row.zeros = value.numel() - value.count_nonzero().item<int64_t>();
    row.pruned = ops::pruned_count(parameter.mask, value.numel());
    row.has_pattern = !is_structured || holds_pattern(options.pattern, ops::unpack_mask(parameter.mask, value.sizes()));
    if (row.zeros < row.pruned) {
      row.note =
          fmt::format("{} pruned values are not zero: call step() after the optimizer's", row.pruned - row.zeros);
    } else if (row.elements > 0 && row.pruned == row.elements) {
      row.note = "all of it is pruned";
    } else if (!row.has_pattern) {
      row.note = fmt::format("does not have the pattern {} yet", report.pattern);
    } else if (options.scope == Scope::local && options.sparsity > 0.0 && options.layers.empty() && !is_structured &&
               ops::elements_to_prune(options.sparsity, row.elements) == 0) {
      row.note = fmt::format("too small: {} of {} elements rounds to none", options.sparsity, row.elements);
    }
    report.tensors.push_back(std::move(row));
  }
  return report;
}

}  // namespace rarefy::pruning
