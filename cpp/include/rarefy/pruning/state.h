#pragma once

#include <ATen/core/Tensor.h>
#include <rarefy/export.h>
#include <rarefy/pruning/mask_choice.h>
#include <rarefy/pruning/report.h>
#include <rarefy/pruning/schedule.h>

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

// What a pruner computes, on tensors alone. MagnitudePruner gathers them from a torch::nn::Module, and the Python class
// from a Python module; both then call the functions here, so that both do the same at each step.
namespace rarefy::pruning {

struct RAREFY_API MagnitudePrunerOptions {
  double sparsity = 0.5;                                           // the final fraction of zeros, in [0, 1)
  Scope scope = Scope::global;                                     // what competes for being kept
  Schedule schedule = ConstantSchedule{};                          // when masks are updated, and how far
  std::optional<std::vector<std::string>> include = std::nullopt;  // see select_parameters()
  std::vector<std::string> exclude = {};

  /// Throws c10::ValueError when a field is out of range.
  void validate() const;
};

/// A parameter and its packed mask.
struct MaskedParameter {
  std::string name;
  at::Tensor value;
  at::Tensor mask;
};

/// Tensors of the model, changed in place.
struct PruningState {
  std::vector<MaskedParameter> parameters;
  at::Tensor step;  // int64, one element
};

/// The key of a parameter's mask, "<parameter>_mask_bits", and of the counter.
RAREFY_API std::string mask_key(const std::string& parameter);
inline constexpr const char* kStepKey = "pruning_step";

/// True when a model with the buffers `existing` (those with a key of pruning) continues, false when it has none.
/// Throws c10::ValueError when they are not exactly those of `parameters`.
RAREFY_API bool check_existing(const std::vector<std::string>& existing, const std::vector<std::string>& parameters);

/// Sets what the masks prune to zero, in values and in dense gradients. The one place where masks are enforced.
RAREFY_API void apply_masks(const PruningState& state);

/// One step: see MagnitudePruner::step().
RAREFY_API void advance(PruningState& state, const MagnitudePrunerOptions& options);

/// The fraction of elements that the masks prune.
RAREFY_API double masked_fraction(const PruningState& state);

RAREFY_API PruningReport make_report(const PruningState& state, const MagnitudePrunerOptions& options,
                                     const std::vector<LeftAlone>& left_alone);

}  // namespace rarefy::pruning
