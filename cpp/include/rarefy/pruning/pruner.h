#pragma once

#include <rarefy/export.h>
#include <rarefy/pruning/enforce.h>
#include <rarefy/pruning/report.h>
#include <rarefy/pruning/schedule.h>
#include <rarefy/pruning/selection.h>
#include <rarefy/pruning/state.h>
#include <torch/nn/module.h>

#include <map>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

namespace torch::optim {
class Optimizer;
}

namespace rarefy::pruning {

struct SparseReport;

/// Prunes a model gradually while it trains: after each optimizer step, the weights of lowest score are held at zero by
/// masks that follow a schedule.
///
///   Pruner pruner(*net, {.sparsity = 0.9, .schedule = PolynomialSchedule{.end = 1000, .every = 50}});
///   for (...) { ...; optimizer.step(); pruner.step(); }
///   pruner.finalize();
///
/// or, for the optimizer's moments too and without accumulate(), pruner.step(optimizer) in place of both.
///
/// Parameters keep their identity and their names, so that optimizers stay valid and a forward pass costs what it did.
/// All state lives in buffers of the model, so that torch::save keeps it and a fresh pruner on a loaded model goes on
/// as if nothing had happened:
///   <module path>.<parameter>_mask_bits    the packed mask (see rarefy/ops/mask.h), uint8
///   <module path>.<parameter>_mask_score   for criteria of gradients and for given scores
///   <module path>.<parameter>_mask_latent  for soft masks: the dense weights where they are pruned
///   <module path>.<tensor>_mask_rewind     for rewinding of weights: of all parameters and buffers
///   pruning_step                           of the model itself: how often step() ran, int64
/// Construct the pruner first, load second. A model that has these buffers already is continued.
///
/// torch's Module::clone() refuses a module with buffers that its reset() does not make, and so refuses masks; save and
/// load, or clone before pruning. The model must outlive the pruner. One pruner per model.
class RAREFY_API Pruner {
 public:
  /// Throws c10::ValueError when an option is out of range, when select_parameters() does, when a parameter cannot have
  /// the pattern, and when the model has masks for other parameters than those chosen; then the model is as it was.
  explicit Pruner(torch::nn::Module& model, PrunerOptions options = {});

  /// Over an explicit list of parameters, which is the selection: include and exclude must be unset. The buffers belong
  /// to the pruner; buffers() gives them for saving and loading.
  explicit Pruner(const std::vector<NamedParameter>& parameters, PrunerOptions options = {});

  /// Masks that were made elsewhere, by full parameter name: boolean of its shape, true = kept, or packed. They are applied
  /// and hold (FixedSchedule). Throws c10::ValueError for names that the model does not have, for other shapes and when it
  /// has masks already, c10::TypeError for other types; then the model is as it was.
  static Pruner from_masks(torch::nn::Module& model, const std::map<std::string, at::Tensor>& masks);

  /// Call between the backward pass and optimizer.step(), once per step, when needs_accumulate(): adds the gradients to the
  /// scores of criteria that use them, and brings back dense weights for the optimizer under soft masks. Throws
  /// c10::ValueError when there are no gradients, or some that are not finite (a step to skip); then nothing has changed.
  void accumulate();

  /// True when the step that comes next needs accumulate().
  bool needs_accumulate() const;

  /// Call after optimizer.step(): counts one step, makes masks when the schedule says so, and sets values that they prune to
  /// zero. Gradients are spent by then, and are left alone. Throws c10::ValueError for NaN in a weight when masks are made, and for masks
  /// that do not fit (a checkpoint of another model); then nothing has changed. Throws after finalize(), and without
  /// accumulate() where it is needed.
  void step();

  /// accumulate() where it is needed, optimizer.step(), step(); gradients and moments of the optimizer are masked too, so that
  /// what comes back has no history, and its state is cleared when weights are rewound. Gradients alone are written when
  /// keeps_zeros() says that the rest stays zero, unless masks change or someone else wrote values, masks or moments.
  void step(torch::optim::Optimizer& optimizer);

  /// Sets pruned weights to zero for good and removes the buffers. Throws when called again.
  void finalize();

  PruningReport report() const;

  /// The same with what the zeros are worth, as measure_sparse() found it.
  PruningReport report(const SparseReport& measured) const;

  /// The fraction of elements that the masks prune now.
  double sparsity() const;

  /// How often step() ran, over all resumed runs.
  int64_t steps() const;

  /// Where training is in its own schedule: steps(), or behind it once Iterative has rewound. Set the learning rate by it.
  int64_t training_step() const;

  /// True when the last step() went back in the training schedule.
  bool rewound() const { return rewound_; }

  /// Given scores are not in it any more: they are buffers.
  const PrunerOptions& options() const { return options_; }

  /// The parameters with their masks, for enforce() and check_masks().
  const PruningState& state() const { return state_; }

  /// "Pruner(3 tensors, Magnitude(p=1), 2:4, global, sparsity 0.25 of 0.5, step 10, PolynomialSchedule(...))"
  std::string to_string() const;

  /// The mask buffers, what else is kept, and the step counter, by key.
  std::vector<std::pair<std::string, at::Tensor>> buffers() const;

 private:
  void check_active(const char* function) const;
  void check_accumulated() const;
  void finish_step(const StepResult& result);
  bool is_clean(const torch::optim::Optimizer& optimizer) const;

  struct Place {
    std::shared_ptr<torch::nn::Module> owner;  // null when the module is the model itself
    torch::nn::Module* module = nullptr;       // null for an explicit list
    std::string buffer;
  };

  PrunerOptions options_;
  PruningState state_;
  std::vector<LeftAlone> left_alone_;
  std::vector<Place> places_;  // of each buffer
  bool accumulated_ = false;
  bool rewound_ = false;
  std::vector<TensorVersion> clean_;  // what step(optimizer) left zero where masks prune; empty: nothing is known
  std::optional<PruningReport> final_report_;
};

/// A pruner by magnitude. Throws c10::ValueError for options with another criterion or given scores.
class RAREFY_API MagnitudePruner : public Pruner {
 public:
  explicit MagnitudePruner(torch::nn::Module& model, PrunerOptions options = {});
  explicit MagnitudePruner(const std::vector<NamedParameter>& parameters, PrunerOptions options = {});
};

}  // namespace rarefy::pruning
