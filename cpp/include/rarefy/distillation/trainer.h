#pragma once

#include <rarefy/distillation/model.h>
#include <rarefy/export.h>
#include <torch/optim/optimizer.h>
#include <torch/serialize/archive.h>
#include <torch/types.h>

#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <vector>

namespace rarefy::distillation {

/// One batch. `labels` may be undefined where the loss needs none.
struct Batch {
  torch::Tensor inputs;
  torch::Tensor labels;
};

/// The next batch, or nothing at the end of an epoch; called again after that, it starts the next epoch.
using BatchSource = std::function<std::optional<Batch>()>;

/// A source that goes through a torch::data loader of examples (data, target), which outlives it.
template <typename Loader>
BatchSource batches(Loader& loader) {
  using Iterator = decltype(loader.begin());
  return [&loader, position = std::optional<Iterator>()]() mutable -> std::optional<Batch> {
    if (!position.has_value()) {
      position.emplace(loader.begin());
    } else {
      ++*position;
    }
    if (*position == loader.end()) {
      position.reset();
      return std::nullopt;
    }
    return Batch{(*position)->data, (*position)->target};
  };
}

/// (student logits, teacher logits, labels) to a scalar. A DistillationLoss is one.
using LossFunction = std::function<torch::Tensor(const torch::Tensor&, const torch::Tensor&, const torch::Tensor&)>;

/// An optimizer as the trainer sees it.
struct RAREFY_API OptimizerInterface {
  std::function<void()> zero_grad;
  std::function<void()> step;
  std::function<std::vector<torch::Tensor>()> parameters;  // what gradient clipping measures

  OptimizerInterface(std::function<void()> zero_grad, std::function<void()> step,
                     std::function<std::vector<torch::Tensor>()> parameters);
  /// Any optimizer of LibTorch, which outlives the trainer.
  OptimizerInterface(torch::optim::Optimizer& optimizer);  // NOLINT(google-explicit-constructor)
};

struct StepResult {
  double loss;
};

/// Of the student, in evaluation mode.
struct Evaluation {
  double loss;  // averaged over the rows with a label other than ignore_index
  std::optional<double>
      accuracy;  // the part of those rows whose largest logit is the label's; unset without class labels
};

struct EpochMetrics {
  int64_t epoch;  // 1 for the first
  int64_t step;   // steps done since the start of training
  double loss;    // mean over the steps of the epoch
  std::optional<Evaluation> evaluation;
};

struct Callbacks {
  /// After each step, with the number of steps done so far and the loss before the step: the place of a pruning schedule.
  std::function<void(int64_t step, double loss)> on_step;
  /// After each epoch, with the number of epochs done so far. The trainer's state is ready to be saved.
  std::function<void(int64_t epoch, const EpochMetrics& metrics)> on_epoch_end;
};

/// Where training stands. torch::save and torch::load take it. Models and optimizer are saved by their own means.
struct RAREFY_API TrainerState {
  int64_t epoch = 0;  // epochs done
  int64_t step = 0;   // steps done
  std::vector<EpochMetrics> history;

  /// Throws c10::ValueError unless epoch and step are 0 or more and history has one entry per epoch.
  void validate() const;
};
RAREFY_API torch::serialize::OutputArchive& operator<<(torch::serialize::OutputArchive& archive,
                                                       const TrainerState& state);
RAREFY_API torch::serialize::InputArchive& operator>>(torch::serialize::InputArchive& archive, TrainerState& state);

struct RAREFY_API DistillationTrainerOptions {
  double max_grad_norm = 0.0;   // gradients are scaled down to this 2-norm before a step; 0: not at all
  int64_t ignore_index = -100;  // label of rows that evaluation leaves out

  /// Throws c10::ValueError for a field out of range.
  void validate() const;
};

/// Trains a student on the logits of a teacher and, as the loss says, on labels. A step is
///
///   loss = loss_function(student(inputs), teacher(inputs), labels);  zero_grad();  backward();  clip;  step()
///
/// The teacher runs in evaluation mode and without recording gradients; fit and evaluate put the modes of both models back
/// as they were, also when something throws. What a model, a source or a callback throws comes out unchanged.
class RAREFY_API DistillationTrainer {
 public:
  DistillationTrainer(Model student, Model teacher, OptimizerInterface optimizer, LossFunction loss,
                      DistillationTrainerOptions options = {});

  /// One step; the student's mode is the caller's. Throws c10::ValueError when the loss (or, with clipping, the norm of the
  /// gradient) is not finite; the message names the step, and the parameters are as they were before it.
  StepResult train_step(const torch::Tensor& inputs, const torch::Tensor& labels = {});

  /// Trains, the student in training mode, until `epochs` epochs are done, those of a loaded state included: a script that
  /// was interrupted is run again as it is. `evaluation` (may be empty) is evaluated after each epoch. Throws
  /// c10::ValueError when a source has no batches. Returns the history.
  const std::vector<EpochMetrics>& fit(const BatchSource& next_batch, int64_t epochs, const Callbacks& callbacks = {},
                                       const BatchSource& evaluation = {});

  /// Loss and accuracy of the student over one epoch of batches. Changes nothing.
  Evaluation evaluate(const BatchSource& next_batch);

  const TrainerState& state() const { return state_; }
  const std::vector<EpochMetrics>& history() const { return state_.history; }
  /// Continue from a saved state. Throws c10::ValueError for one that is not consistent.
  void load_state(TrainerState state);

 private:
  double step(const Batch& batch);
  void run_epoch(const BatchSource& next_batch, const Callbacks& callbacks, const BatchSource& evaluation);
  torch::Tensor teacher_logits(const torch::Tensor& inputs) const;

  Model student_;
  Model teacher_;
  OptimizerInterface optimizer_;
  LossFunction loss_;
  DistillationTrainerOptions options_;
  TrainerState state_;
};

}  // namespace rarefy::distillation
