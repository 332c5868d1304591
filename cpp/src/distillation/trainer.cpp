#include <c10/util/Exception.h>
#include <rarefy/distillation/trainer.h>
#include <torch/nn/utils/clip_grad.h>
#include <torch/utils.h>

#include <cmath>
#include <utility>

namespace rarefy::distillation {
namespace {

/// body() with the model in the given mode; its modules are put back as they were, whatever happens.
/// Not a destructor's work: putting a model back may itself throw (a Python model interrupted by the user).
template <typename Body>
auto in_mode(const Model& model, bool training, const Body& body) {
  const Model::Restore restore = model.enter_mode ? model.enter_mode(training) : Model::Restore([] {});
  try {
    auto result = body();
    restore();
    return result;
  } catch (...) {
    restore();
    throw;
  }
}

double to_loss(const torch::Tensor& loss) {
  TORCH_CHECK_VALUE(
      loss.defined() && loss.numel() == 1, "[DistillationTrainer] the loss function must return one number, got ",
      loss.defined() ? "a tensor of shape " : "nothing", loss.defined() ? loss.sizes() : at::IntArrayRef{});
  return loss.item<double>();
}

bool are_classes(const torch::Tensor& labels, const torch::Tensor& logits) {
  return labels.defined() && labels.scalar_type() == torch::kLong && logits.dim() >= 1 &&
         labels.sizes() == logits.sizes().slice(0, static_cast<size_t>(logits.dim()) - 1);
}

}  // namespace

OptimizerInterface::OptimizerInterface(std::function<void()> zero, std::function<void()> take_step,
                                       std::function<std::vector<torch::Tensor>()> all_parameters)
    : zero_grad(std::move(zero)), step(std::move(take_step)), parameters(std::move(all_parameters)) {}

OptimizerInterface::OptimizerInterface(torch::optim::Optimizer& optimizer)
    : zero_grad([&optimizer] { optimizer.zero_grad(); }),
      step([&optimizer] { optimizer.step(); }),
      parameters([&optimizer] {
        std::vector<torch::Tensor> all;
        for (const auto& group : optimizer.param_groups()) {
          all.insert(all.end(), group.params().begin(), group.params().end());
        }
        return all;
      }) {}

void DistillationTrainerOptions::validate() const {
  TORCH_CHECK_VALUE(max_grad_norm >= 0.0 && std::isfinite(max_grad_norm),
                    "[DistillationTrainer] max_grad_norm must be 0 (no clipping) or positive and finite, got ",
                    max_grad_norm);
}

DistillationTrainer::DistillationTrainer(Model student, Model teacher, OptimizerInterface optimizer, LossFunction loss,
                                         DistillationTrainerOptions options)
    : student_(std::move(student)),
      teacher_(std::move(teacher)),
      optimizer_(std::move(optimizer)),
      loss_(std::move(loss)),
      options_(options) {
  options_.validate();
}

torch::Tensor DistillationTrainer::teacher_logits(const torch::Tensor& inputs) const {
  const torch::NoGradGuard no_grad;
  return teacher_.forward(inputs);
}

double DistillationTrainer::step(const Batch& batch) {
  const torch::Tensor target = teacher_logits(batch.inputs);
  const torch::Tensor loss = loss_(student_.forward(batch.inputs), target, batch.labels);
  const double value = to_loss(loss);
  const int64_t number = state_.step + 1;
  TORCH_CHECK_VALUE(std::isfinite(value), "[DistillationTrainer] the loss must be finite, got ", value, " at step ",
                    number, "; the parameters are those after step ", state_.step);
  optimizer_.zero_grad();
  loss.backward();
  if (options_.max_grad_norm > 0.0) {
    const double norm = torch::nn::utils::clip_grad_norm_(optimizer_.parameters(), options_.max_grad_norm);
    TORCH_CHECK_VALUE(std::isfinite(norm), "[DistillationTrainer] the gradient's norm must be finite, got ", norm,
                      " at step ", number, "; the parameters are those after step ", state_.step);
  }
  optimizer_.step();
  state_.step = number;
  return value;
}

StepResult DistillationTrainer::train_step(const torch::Tensor& inputs, const torch::Tensor& labels) {
  return in_mode(teacher_, false, [&] { return StepResult{step({inputs, labels})}; });
}

void DistillationTrainer::run_epoch(const BatchSource& next_batch, const Callbacks& callbacks,
                                    const BatchSource& evaluation) {
  const int64_t epoch = state_.epoch + 1;
  double total = 0.0;
  int64_t steps = 0;
  for (auto batch = next_batch(); batch.has_value(); batch = next_batch()) {
    const double loss = step(*batch);
    total += loss;
    ++steps;
    if (callbacks.on_step) {
      callbacks.on_step(state_.step, loss);
    }
  }
  TORCH_CHECK_VALUE(steps > 0, "[DistillationTrainer] an epoch must have at least one batch, got none in epoch ", epoch,
                    " (a source starts anew after its end)");
  EpochMetrics metrics{epoch, state_.step, total / static_cast<double>(steps), std::nullopt};
  if (evaluation) {
    metrics.evaluation = evaluate(evaluation);
  }
  state_.epoch = epoch;
  state_.history.push_back(metrics);
  if (callbacks.on_epoch_end) {
    callbacks.on_epoch_end(epoch, metrics);
  }
}

const std::vector<EpochMetrics>& DistillationTrainer::fit(const BatchSource& next_batch, int64_t epochs,
                                                          const Callbacks& callbacks, const BatchSource& evaluation) {
  TORCH_CHECK_VALUE(epochs >= 0, "[DistillationTrainer] epochs must be 0 or more, got ", epochs);
  in_mode(teacher_, false, [&] {
    return in_mode(student_, true, [&] {
      while (state_.epoch < epochs) {
        run_epoch(next_batch, callbacks, evaluation);
      }
      return state_.epoch;
    });
  });
  return state_.history;
}

Evaluation DistillationTrainer::evaluate(const BatchSource& next_batch) {
  const torch::NoGradGuard no_grad;
  return in_mode(teacher_, false, [&] {
    return in_mode(student_, false, [&] {
      double total = 0.0;
      int64_t rows = 0, labelled = 0, correct = 0, batches = 0;
      for (auto batch = next_batch(); batch.has_value(); batch = next_batch()) {
        ++batches;
        const torch::Tensor target = teacher_logits(batch->inputs);
        const torch::Tensor logits = student_.forward(batch->inputs);
        const bool classes = are_classes(batch->labels, logits);
        int64_t count = logits.dim() == 0 ? 1 : logits.numel() / logits.size(-1);
        if (classes) {
          const torch::Tensor valid = batch->labels != options_.ignore_index;
          count = valid.sum().item<int64_t>();
          labelled += count;
          correct += ((logits.argmax(-1) == batch->labels) & valid).sum().item<int64_t>();
        }
        if (count > 0) {
          total += to_loss(loss_(logits, target, batch->labels)) * static_cast<double>(count);
          rows += count;
        }
      }
      TORCH_CHECK_VALUE(rows > 0, "[DistillationTrainer] evaluation must have at least one valid row, got ", batches,
                        " batches and none");
      Evaluation result{total / static_cast<double>(rows), std::nullopt};
      if (labelled > 0) {
        result.accuracy = static_cast<double>(correct) / static_cast<double>(labelled);
      }
      return result;
    });
  });
}

void DistillationTrainer::load_state(TrainerState state) {
  state.validate();
  state_ = std::move(state);
}

}  // namespace rarefy::distillation
