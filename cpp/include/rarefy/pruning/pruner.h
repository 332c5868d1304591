#pragma once

#include <rarefy/export.h>
#include <rarefy/pruning/report.h>
#include <rarefy/pruning/schedule.h>
#include <rarefy/pruning/selection.h>
#include <rarefy/pruning/state.h>
#include <torch/nn/module.h>

#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

namespace rarefy::pruning {

/// Prunes a model gradually while it trains: after each optimizer step, the weights of smallest magnitude are held at
/// zero by masks that grow along a schedule.
///
///   MagnitudePruner pruner(*net, {.sparsity = 0.9, .schedule = PolynomialSchedule{.end = 1000, .every = 50}});
///   for (...) { ...; optimizer.step(); pruner.step(); }
///   pruner.finalize();
///
/// Parameters keep their identity and their names, so that optimizers stay valid and a forward pass costs what it did.
/// All state lives in buffers of the model, so that torch::save keeps it and a fresh pruner on a loaded model goes on
/// as if nothing had happened:
///   <module path>.<parameter>_mask_bits   the packed mask (see rarefy/ops/mask.h), uint8
///   pruning_step                          of the model itself: how often step() ran, int64
/// Construct the pruner first, load second. A model that has these buffers already is continued.
///
/// torch's Module::clone() refuses a module with buffers that its reset() does not make, and so refuses masks; save and
/// load, or clone before pruning. The model must outlive the pruner. One pruner per model.
class RAREFY_API MagnitudePruner {
 public:
  /// Throws c10::ValueError when an option is out of range, when select_parameters() does, and when the model has masks
  /// for other parameters than those chosen; then the model is as it was.
  explicit MagnitudePruner(torch::nn::Module& model, MagnitudePrunerOptions options = {});

  /// Over an explicit list of parameters, which is the selection: include and exclude must be unset. The buffers belong
  /// to the pruner; buffers() gives them for saving and loading.
  explicit MagnitudePruner(const std::vector<NamedParameter>& parameters, MagnitudePrunerOptions options = {});

  /// Call after optimizer.step(): counts one step, grows the masks when the schedule says so, and sets what they prune
  /// to zero in values and gradients. Throws c10::ValueError for NaN in a weight when masks are made, and for masks
  /// that do not fit (a checkpoint of another model); then nothing has changed. Throws after finalize().
  void step();

  /// Sets pruned weights to zero for good and removes the buffers. Throws when called again.
  void finalize();

  PruningReport report() const;

  /// The fraction of elements that the masks prune now.
  double sparsity() const;

  /// How often step() ran, over all resumed runs.
  int64_t steps() const;

  const MagnitudePrunerOptions& options() const { return options_; }

  /// The mask buffers and the step counter, by key.
  std::vector<std::pair<std::string, at::Tensor>> buffers() const;

 private:
  void check_active(const char* function) const;

  struct Place {
    std::shared_ptr<torch::nn::Module> owner;  // null when the module is the model itself
    torch::nn::Module* module = nullptr;       // null for an explicit list
    std::string buffer;
  };

  MagnitudePrunerOptions options_;
  PruningState state_;
  std::vector<LeftAlone> left_alone_;
  std::vector<Place> places_;  // of each mask, then of the step counter
  std::optional<PruningReport> final_report_;
};

}  // namespace rarefy::pruning
