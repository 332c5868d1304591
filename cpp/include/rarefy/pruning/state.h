#pragma once

#include <ATen/core/Tensor.h>
#include <rarefy/export.h>
#include <rarefy/pruning/element_criterion.h>
#include <rarefy/pruning/mask_choice.h>
#include <rarefy/pruning/pattern.h>
#include <rarefy/pruning/regrowth.h>
#include <rarefy/pruning/report.h>
#include <rarefy/pruning/schedule.h>

#include <cstdint>
#include <map>
#include <optional>
#include <string>
#include <utility>
#include <vector>

// What a pruner computes, on tensors alone. Pruner gathers them from a torch::nn::Module, and the Python class from a
// Python module; both then call the functions here, so that both do the same at each step.
namespace rarefy::pruning {

struct RAREFY_API PrunerOptions {
  double sparsity = 0.5;                                           // the final fraction of zeros, in [0, 1)
  Scope scope = Scope::global;                                     // what competes for being kept
  Schedule schedule = ConstantSchedule{};                          // when masks are updated, and how far
  Pattern pattern = Unstructured{};                                // what is pruned together
  ElementCriterion criterion = Magnitude{};                        // what is kept: the largest scores
  std::vector<std::pair<std::string, double>> layers = {};         // own final sparsities: see MaskChoice::layers
  std::optional<Regrowth> regrowth = std::nullopt;                 // how pruned weights come back; unset: they do not
  std::optional<std::vector<std::string>> include = std::nullopt;  // see select_parameters()
  std::vector<std::string> exclude = {};
  /// Scores that were computed before, by parameter, in place of `criterion`: one of its sizes for each that is chosen.
  std::optional<std::map<std::string, at::Tensor>> scores = std::nullopt;

  /// Throws c10::ValueError when a field is out of range, and for fields that do not go together.
  void validate() const;
};

using MagnitudePrunerOptions = PrunerOptions;

/// A parameter with its packed mask and what else is kept for it; the last three are undefined where it is not needed.
struct MaskedParameter {
  std::string name;
  at::Tensor value;
  at::Tensor mask;
  at::Tensor score = {};   // what accumulate_gradients() made, or a given score
  at::Tensor latent = {};  // soft masks: the dense weights where the mask prunes, 0 elsewhere
  at::Tensor growth = {};  // RigL: the dense gradient of this step, where it is no longer value.grad()
};

/// A tensor of the model that rewinding sets back, and what it was.
struct Snapshot {
  std::string name;
  at::Tensor value;
  at::Tensor saved;
};

/// Tensors of the model, changed in place.
struct PruningState {
  std::vector<MaskedParameter> parameters;
  at::Tensor step;  // int64, one element
  std::vector<Snapshot> snapshots = {};
};

// Keys of buffers: "<parameter>_mask_bits" for the packed mask, "<parameter>_mask_score", "<parameter>_mask_latent" and
// "<tensor>_mask_rewind" where they are needed, and the counter.
RAREFY_API std::string mask_key(const std::string& parameter);
RAREFY_API std::string score_key(const std::string& parameter);
RAREFY_API std::string latent_key(const std::string& parameter);
RAREFY_API std::string rewind_key(const std::string& tensor);
inline constexpr const char* kStepKey = "pruning_step";

/// True for the last component of a key of pruning, whatever it belongs to.
RAREFY_API bool is_pruning_key(const std::string& key);

// Which of them the options need.
RAREFY_API bool keeps_scores(const PrunerOptions& options);
RAREFY_API bool keeps_latent(const PrunerOptions& options);
RAREFY_API bool keeps_snapshots(const PrunerOptions& options);

/// The buffers of a parameter in a new pruner, by key: its mask, and what else the options need. Throws c10::ValueError
/// for a parameter that cannot have the pattern, and when scores are given but not of its sizes.
RAREFY_API std::vector<std::pair<std::string, at::Tensor>> new_buffers(const PrunerOptions& options,
                                                                       const std::string& name,
                                                                       const at::Tensor& value);

/// Throws c10::ValueError for scores and layers that name none of the parameters chosen.
RAREFY_API void check_names(const PrunerOptions& options, const std::vector<std::string>& parameters);

/// True when a model with the buffers `existing` (those with a key of pruning) continues, false when it has none. Throws
/// c10::ValueError when they are not exactly those of `parameters` and, beside masks and counter, `others`.
RAREFY_API bool check_existing(const std::vector<std::string>& existing, const std::vector<std::string>& parameters,
                               const std::vector<std::string>& others = {});

/// Sets what the masks prune to zero, in values and in dense gradients; see rarefy/pruning/enforce.h.
RAREFY_API void apply_masks(const PruningState& state);

/// True when accumulate_gradients() has to be called for the step that comes next: for criteria of gradients up to the last update
/// of masks, for soft masks up to their end.
RAREFY_API bool needs_accumulate(const PruningState& state, const PrunerOptions& options);

/// True when the step that comes next reads the dense gradients of this step (RigL).
RAREFY_API bool needs_growth(const PruningState& state, const PrunerOptions& options);

/// Between the backward pass and optimizer.step(): see Pruner::accumulate().
RAREFY_API void accumulate_gradients(PruningState& state, const PrunerOptions& options);

/// What a step did.
struct RAREFY_API StepResult {
  bool updated = false;  // masks, or weights by rewinding, were made anew
  bool rewound = false;  // training went back in its schedule: see Iterative
};

/// One step: see Pruner::step().
RAREFY_API StepResult advance(PruningState& state, const PrunerOptions& options);

/// The same for a caller that applies the masks itself, to moments of optimizers too: masks and counter are written, and
/// values only where that cannot be made up for by applying the new masks (what regrows starts at 0; rewinding; soft masks).
RAREFY_API StepResult update_masks(PruningState& state, const PrunerOptions& options);

/// True when the step that comes next may let pruned elements come back: whoever keeps moments of optimizers sets those of
/// pruned elements to zero before.
RAREFY_API bool may_regrow(const PruningState& state, const PrunerOptions& options);

/// True while the optimizer works on dense weights (soft masks): gradients and moments of pruned elements are needed.
RAREFY_API bool is_soft(const PruningState& state, const PrunerOptions& options);

/// Where training is in its own schedule after `step` steps: behind `step` once Iterative has rewound.
RAREFY_API int64_t training_step(const PrunerOptions& options, int64_t step);

/// Packed masks of boolean ones of the parameters' sizes (true = kept), or of those that are packed already. Throws
/// c10::ValueError for names that differ from the parameters', for other sizes, c10::TypeError for other types.
RAREFY_API std::vector<at::Tensor> pack_masks(const std::vector<std::string>& names,
                                              const std::vector<at::Tensor>& values,
                                              const std::map<std::string, at::Tensor>& masks);

/// The fraction of elements that the masks prune.
RAREFY_API double masked_fraction(const PruningState& state);

RAREFY_API PruningReport make_report(const PruningState& state, const PrunerOptions& options,
                                     const std::vector<LeftAlone>& left_alone);

}  // namespace rarefy::pruning
