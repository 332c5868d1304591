#pragma once

#include <rarefy/distillation/model.h>
#include <rarefy/distillation/objective.h>
#include <rarefy/export.h>
#include <torch/optim/optimizer.h>
#include <torch/optim/schedulers/lr_scheduler.h>
#include <torch/serialize/archive.h>
#include <torch/types.h>

#include <cstdint>
#include <functional>
#include <map>
#include <optional>
#include <string>
#include <utility>
#include <vector>

namespace rarefy::distillation {

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

/// An optimizer as the trainer sees it.
struct RAREFY_API OptimizerInterface {
  std::function<void()> zero_grad;
  std::function<void()> step;
  std::function<std::vector<torch::Tensor>()> parameters;  // what is clipped, unscaled and measured

  OptimizerInterface(std::function<void()> zero_grad, std::function<void()> step,
                     std::function<std::vector<torch::Tensor>()> parameters);
  /// Any optimizer of LibTorch, which outlives the trainer.
  OptimizerInterface(torch::optim::Optimizer& optimizer);  // NOLINT(google-explicit-constructor)
};

/// A learning-rate schedule as the trainer sees it.
struct RAREFY_API SchedulerInterface {
  enum class When { step, epoch };

  /// Called after each step of the optimizer or after each epoch, then with the value that selects the best epoch, where
  /// one was measured.
  std::function<void(std::optional<double> metric)> advance = {};
  When when = When::step;

  SchedulerInterface() = default;
  SchedulerInterface(std::function<void(std::optional<double>)> advance, When when);
  /// A schedule of LibTorch, which outlives the trainer.
  SchedulerInterface(torch::optim::LRScheduler& scheduler,  // NOLINT(google-explicit-constructor)
                     When when = When::step);
};

/// The random state as a list of tensors. Python adds the generators of Python, NumPy and the loader.
struct RAREFY_API RandomInterface {
  std::function<std::vector<torch::Tensor>()> capture;
  std::function<void(const std::vector<torch::Tensor>&)> restore;

  /// torch's default generators, of the CPU and of every CUDA device.
  RandomInterface();
};

/// The type in which the forward passes multiply: that of the tensors themselves (float32), or 16 bits by autocast. With
/// float16 the loss is scaled so that small gradients survive (Micikevicius et al., 2018, arXiv:1710.03740).
enum class Precision { float32, bfloat16, float16 };

/// Which epoch is the best, by a metric of its evaluation, and when to stop for want of a better one.
struct RAREFY_API Selection {
  std::string metric;  // "loss", "accuracy", or a name that Callbacks::evaluate gives
  bool maximize;
  double min_delta;  // how much better than the best an epoch must be
  int64_t patience;  // epochs without a better one after which training ends; 0: never

  Selection();  // the least loss
  Selection(std::string metric, bool maximize, double min_delta = 0.0, int64_t patience = 0);
};

/// What one step reports.
struct StepResult {
  int64_t step;
  double loss;  // before the step, averaged over the valid rows
  /// Each term before its weight, in the objective's order.
  std::vector<std::pair<std::string, double>> terms = {};
  /// The part of each term in the sum of the terms' gradient norms; empty where it was not measured.
  std::vector<std::pair<std::string, double>> shares = {};
  std::optional<double> grad_norm = {};  // before clipping; unset without clipping
  bool skipped = false;                  // the scaled gradient of float16 was not finite: nothing was changed
};

/// Of the student, in evaluation mode.
struct Evaluation {
  double loss;  // averaged over the rows with a label other than ignore_index
  /// The part of those rows whose largest logit is the label's; unset without class labels.
  std::optional<double> accuracy = {};
  std::map<std::string, double> metrics = {};  // of Callbacks::evaluate
};

struct EpochMetrics {
  int64_t epoch;  // 1 for the first
  int64_t step;   // steps done since the start of training
  double loss;    // mean over the steps of the epoch
  std::optional<Evaluation> evaluation = {};
};

struct Callbacks {
  /// After each step, with the number of steps done so far and the loss before the step: the place of a pruning schedule.
  std::function<void(int64_t step, double loss)> on_step = {};
  /// After each epoch, with the number of epochs done so far. The trainer's state is ready to be saved.
  std::function<void(int64_t epoch, const EpochMetrics& metrics)> on_epoch_end = {};
  /// Metrics of one's own, taken after each epoch with the student in evaluation mode and without recording gradients.
  std::function<std::map<std::string, double>()> evaluate = {};
};

/// Where training stands, between two steps. torch::save and torch::load take it.
struct RAREFY_API TrainerState {
  int64_t epoch = 0;  // epochs done
  int64_t step = 0;   // steps done
  std::vector<EpochMetrics> history = {};

  int64_t batch = 0;                             // batches taken in the epoch that has begun
  double epoch_loss = 0.0;                       // sum of its steps' losses
  int64_t epoch_steps = 0;                       // their number
  int64_t best_epoch = 0;                        // 0: none yet
  double best_value = 0.0;                       // its selection metric
  double loss_scale = 65536;                     // of float16
  int64_t good_steps = 0;                        // steps since the scale last changed
  int64_t advances = 0;                          // of the schedule
  std::vector<torch::Tensor> random = {};        // now
  std::vector<torch::Tensor> epoch_random = {};  // when the epoch began: what its order of batches follows from
  std::vector<StepResult> log = {};

  /// Throws c10::ValueError unless counts are 0 or more, history has one entry per epoch, and best_epoch is one of them.
  void validate() const;
};
RAREFY_API torch::serialize::OutputArchive& operator<<(torch::serialize::OutputArchive& archive,
                                                       const TrainerState& state);
RAREFY_API torch::serialize::InputArchive& operator>>(torch::serialize::InputArchive& archive, TrainerState& state);

struct RAREFY_API DistillationTrainerOptions {
  double max_grad_norm = 0.0;   // gradients are scaled down to this 2-norm before a step; 0: not at all
  int64_t ignore_index = -100;  // label of rows that neither count nor are evaluated
  int64_t accumulate = 1;       // batches whose gradients make one step, weighed by their valid rows
  Precision precision = Precision::float32;
  c10::DeviceType device = c10::kCPU;  // where autocast applies
  int64_t log_every = 0;               // steps between two entries of the log, with gradient shares; 0: no log
  bool shift = false;                  // the label of a position is the next one's input: causal language models
  Selection selection = {};
  /// The weights of a batch's rows, in the shape of its labels; a row of weight 0 is not valid. Empty: all alike.
  std::function<torch::Tensor(const Batch&)> row_weights = {};
  /// The number of valid rows of a batch, where neither labels nor row_weights tell. Empty: labels of int64 other than
  /// ignore_index, by their weights; without labels, the size of the first dimension of the inputs.
  std::function<double(const Batch&)> count = {};
  /// Adds a tensor up over all processes, in place. Empty: there is one process. Processes must take equally many steps.
  std::function<void(torch::Tensor&)> all_reduce_sum = {};
  int64_t processes = 1;
  RandomInterface random = {};
  /// What a batch becomes before a step: completions sampled from the student, mixed images. Not called for batches that a
  /// resumed run passes over. May be empty.
  std::function<Batch(Batch)> prepare = {};

  /// Throws c10::ValueError for a field out of range.
  void validate() const;
};

/// Trains a student on the outputs of a teacher and, as the objective says, on labels. A step is
///
///   zero_grad();  for each of `accumulate` batches: sum of the terms, weighed by valid rows -> backward();
///   clip;  optimizer;  schedule
///
/// The teacher runs in evaluation mode, without recording gradients, and must not change; fit and evaluate put the modes of
/// both models back as they were, also when something throws; a student in training mode keeps the modes of its parts.
/// Batches without a valid row are passed over. What a model, a source or a callback throws comes out
/// unchanged. Runs are repeated bit for bit from any saved state, given deterministic models and sources.
class RAREFY_API DistillationTrainer {
 public:
  DistillationTrainer(Model student, Teacher teacher, OptimizerInterface optimizer, Objective objective);
  /// Throws c10::ValueError for options out of range.
  DistillationTrainer(Model student, Teacher teacher, OptimizerInterface optimizer, Objective objective,
                      DistillationTrainerOptions options, SchedulerInterface scheduler = {});

  /// One step on one batch; the student's mode is the caller's. Throws c10::ValueError without a valid row, or when the loss (or, with clipping, the
  /// norm of the gradient) is not finite; the message names the step, and the parameters are as they were before it.
  StepResult train_step(const Batch& batch);
  StepResult train_step(const torch::Tensor& inputs, const torch::Tensor& labels = {});

  /// Trains, the student in training mode, until `epochs` epochs are done, those of a loaded state included: a script that
  /// was interrupted is run again as it is. An epoch that was interrupted goes on behind the batches that it has done: the
  /// source must give the same ones again. `evaluation` (may be empty) is evaluated after each epoch.
  /// Throws c10::ValueError when a source has no batches, or fewer than were done, and when the teacher changed.
  /// Returns the history.
  const std::vector<EpochMetrics>& fit(const BatchSource& next_batch, int64_t epochs, const Callbacks& callbacks = {},
                                       const BatchSource& evaluation = {});
  /// From a callback: ends fit after this step. The epoch can be gone on with.
  void stop() { stop_ = true; }

  /// Loss and accuracy of the student over one epoch of batches. Changes nothing.
  Evaluation evaluate(const BatchSource& next_batch);

  /// Where training stands, with the random state of now.
  TrainerState state() const;
  int64_t epoch() const { return state_.epoch; }
  int64_t step() const { return state_.step; }
  int64_t best_epoch() const { return state_.best_epoch; }  // 0: none yet
  const std::vector<EpochMetrics>& history() const { return state_.history; }
  const std::vector<StepResult>& log() const { return state_.log; }
  const StepResult& last() const { return last_; }  // of the last step of fit
  /// True when the last `patience` epochs brought nothing better.
  bool out_of_patience() const;
  /// Continue from a saved state; its random state is put in place when fit begins.
  /// Throws c10::ValueError for one that is not consistent.
  void load_state(TrainerState state);
  const Teacher& teacher() const { return teacher_; }

 private:
  std::optional<StepResult> take_step(const std::vector<Batch>& window);
  double accumulate(const Batch& batch, double factor, bool measure, StepResult& result);
  void apply_gradients(StepResult& result);
  void begin_epoch(const BatchSource& next_batch);
  void run_epoch(const BatchSource& next_batch, const Callbacks& callbacks, const BatchSource& evaluation);
  void end_epoch(const Callbacks& callbacks, const BatchSource& evaluation);
  std::vector<double> factors(const std::vector<Batch>& window) const;

  Model student_;
  Teacher teacher_;
  OptimizerInterface optimizer_;
  Objective objective_;
  DistillationTrainerOptions options_;
  SchedulerInterface scheduler_;
  TrainerState state_;
  StepResult last_{0, 0.0};
  bool stop_ = false;
};

}  // namespace rarefy::distillation
