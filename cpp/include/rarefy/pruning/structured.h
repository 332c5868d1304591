#pragma once

#include <rarefy/export.h>
#include <rarefy/graph/record.h>
#include <rarefy/pruning/choice.h>
#include <rarefy/pruning/importance.h>
#include <rarefy/pruning/manifest.h>
#include <rarefy/pruning/structure.h>
#include <rarefy/pruning/structured_report.h>

#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

namespace torch::nn {
class Module;
}
namespace torch::optim {
class Optimizer;
}

namespace rarefy::pruning {

struct RAREFY_API StructuredOptions {
  ChoiceOptions choice = {};              // target, scope, round_to, min_width, limits, strict
  std::optional<double> latency_ms = {};  // in place of choice.target: milliseconds of one forward pass, > 0
  ImportanceOptions importance = {};
  std::vector<std::string> ignore = {};  // patterns of tensors or modules that keep their shape
  int64_t steps = 1;                     // calls of prune() until the target is met, >= 1
  bool fold_constants = true;            // of removed channels into their consumers
  double tolerance = 0;                  // largest difference of outputs over the largest output; 0: by type, 1e-9 for
                                         // float64, 1e-4 for float32, 0.05 for 16 bits

  /// Throws c10::ValueError when a field is out of range.
  void validate() const;
};

/// A recording of the model as it is now, or why its forward pass failed.
struct RAREFY_API Recording {
  graph::Graph graph;  // what ran until then
  std::string failure;
};

/// What is to be done to a model in one transaction.
struct RAREFY_API Plan {
  std::vector<Cut> cuts;
  std::vector<Fold> folds;
  std::vector<Resize> resizes;
  bool cautious = false;  // sizes follow only in modules whose own operators hold them: others may enter a computation
};

/// A model as the pruner sees it, in either language.
struct RAREFY_API PrunableModel {
  /// Runs the model on the example inputs and records it; with shapes_only as RecordOptions says.
  std::function<Recording(bool shapes_only)> record;
  /// Its parameters and buffers.
  std::function<std::vector<graph::NamedTensor>()> tensors;
  /// Scores of the units of each group.
  std::function<std::vector<GroupScore>(const Structure&)> score;
  /// Cuts tensors, gradients, optimizers and attributes, and adds what is folded; until commit() or rollback().
  std::function<void(const Plan&)> apply;
  std::function<void()> rollback;
  std::function<void()> commit;
  /// Runs the model once without recording it, for its time.
  std::function<void()> run;
  /// Parameters and buffers that must keep their shape, and why.
  std::vector<std::pair<std::string, std::string>> pinned = {};
};

/// The transaction that both languages share: record, group, score, choose, compute what the model must give without the
/// chosen units, cut, run, compare, keep or roll back. When the cut model fails or an operator gives other sizes than
/// expected, the operator holds a size of its own (a number in the code): it is pinned, and all begins anew without it.
class RAREFY_API StructuredTransaction {
 public:
  StructuredTransaction(PrunableModel model, StructuredOptions options);

  /// Records the model and returns its groups.
  const Structure& structure();
  /// What prune() would do, by the choice alone: nothing changes, nothing is verified.
  StructuredReport preview();
  /// One step. Throws when nothing helps; the model is then as it was.
  StructuredReport prune();
  /// How often prune() was called with success.
  int64_t steps_done() const { return step_; }
  const StructuredOptions& options() const { return options_; }
  const graph::Graph& recording();

 private:
  void refresh();
  Choice choose_units(const std::vector<GroupScore>& scores);
  bool attempt(const Choice& choice, StructuredReport& report);
  StructuredReport make_report(const Choice& choice) const;
  StructuredReport prune_to_latency(const std::vector<GroupScore>& scores);

  PrunableModel model_;
  StructuredOptions options_;
  std::optional<graph::Graph> graph_;
  std::optional<Structure> structure_;
  Pins pins_;
  std::optional<Baseline> baseline_;
  int64_t step_ = 0;
  int64_t attempts_ = 0;
  bool cautious_ = false;
  bool real_ = false;  // the recording computed: the model may look at values
};

/// Sets sizes that the code of a model keeps itself (heads_, width_) for a plan, and returns what undoes it. Sizes of
/// torch::nn and rarefy::nn modules follow without it.
using Follow = std::function<std::function<void()>(const Plan&)>;

/// Removes channels of a torch::nn model for good, in a transaction that is verified.
///
///   StructuredPruner pruner(*net, [&] { return std::vector{net->forward(x)}; }, {x}, {.choice = {.target = Macs{0.5}}});
///   auto report = pruner.prune({&optimizer});
///   save_pruned(*net, pruner.manifest(), "pruned.safetensors");
///
/// Parameters keep their identity; optimizers keep what they know about what is left. The model must outlive the pruner.
class RAREFY_API StructuredPruner {
 public:
  ///   forward  runs the model on example inputs and returns its outputs; called in evaluation mode under no-grad
  ///   inputs   the tensors that forward() feeds to the model: what depends on them is not a constant
  ///   score    in place of options.importance: one value per unit of a group
  /// Throws c10::ValueError for an option out of range and for a pattern in ignore that names nothing.
  StructuredPruner(torch::nn::Module& model, std::function<std::vector<at::Tensor>()> forward,
                   std::vector<at::Tensor> inputs, StructuredOptions options = {},
                   std::function<at::Tensor(const Group&)> score = nullptr, Follow follow = nullptr);
  ~StructuredPruner();

  const Structure& structure();
  StructuredReport preview();
  /// One of options.steps steps. Any failure leaves model, gradients and optimizers as they were, and throws.
  StructuredReport prune(const std::vector<torch::optim::Optimizer*>& optimizers = {});
  /// What was removed so far, for save_pruned().
  const Manifest& manifest() const;

 private:
  struct State;
  std::unique_ptr<State> state_;
};

}  // namespace rarefy::pruning
