#include <ATen/Context.h>
#include <ATen/detail/CUDAHooksInterface.h>
#include <ATen/ops/tensor.h>
#include <c10/util/Exception.h>
#include <rarefy/distillation/trainer.h>
#include <torch/utils.h>

#include <cmath>
#include <utility>

#include "distillation/autocast.h"
#include "distillation/scoped.h"
#include "distillation/step.h"

namespace rarefy::distillation {
namespace {

bool are_classes(const torch::Tensor& labels, const torch::Tensor& logits) {
  return labels.defined() && logits.defined() && labels.scalar_type() == torch::kLong && logits.dim() >= 1 &&
         labels.sizes() == logits.sizes().slice(0, static_cast<size_t>(logits.dim()) - 1);
}

std::optional<double> selected(const Selection& selection, const std::optional<Evaluation>& evaluation) {
  if (!evaluation.has_value()) {
    return std::nullopt;
  }
  if (selection.metric == "loss") {  // not a number where Callbacks::evaluate alone has measured
    return std::isnan(evaluation->loss) ? std::nullopt : std::optional<double>(evaluation->loss);
  }
  if (selection.metric == "accuracy" && evaluation->accuracy.has_value()) {
    return evaluation->accuracy;
  }
  const auto found = evaluation->metrics.find(selection.metric);
  TORCH_CHECK_VALUE(found != evaluation->metrics.end(), "[DistillationTrainer] the selection's metric '",
                    selection.metric, "' must be measured by the evaluation, which gave no such value");
  return found->second;
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

SchedulerInterface::SchedulerInterface(std::function<void(std::optional<double>)> function, When often)
    : advance(std::move(function)), when(often) {}

SchedulerInterface::SchedulerInterface(torch::optim::LRScheduler& scheduler, When often)
    : advance([&scheduler](std::optional<double>) { scheduler.step(); }), when(often) {}

RandomInterface::RandomInterface()
    : capture([] {
        std::vector<torch::Tensor> states{at::globalContext().defaultGenerator(at::kCPU).get_state()};
        if (at::hasCUDA()) {
          for (int i = 0; i < at::detail::getCUDAHooks().deviceCount(); ++i) {
            states.push_back(at::globalContext()
                                 .defaultGenerator(at::Device(at::kCUDA, static_cast<c10::DeviceIndex>(i)))
                                 .get_state());
          }
        }
        return states;
      }),
      restore([](const std::vector<torch::Tensor>& states) {
        for (size_t i = 0; i < states.size(); ++i) {
          const auto device =
              i == 0 ? at::Device(at::kCPU) : at::Device(at::kCUDA, static_cast<c10::DeviceIndex>(i - 1));
          auto generator = at::globalContext().defaultGenerator(device);
          generator.set_state(states[i]);
        }
      }) {}

Selection::Selection() : Selection("loss", false) {}

Selection::Selection(std::string name, bool more_is_better, double delta, int64_t epochs)
    : metric(std::move(name)), maximize(more_is_better), min_delta(delta), patience(epochs) {}

void DistillationTrainerOptions::validate() const {
  TORCH_CHECK_VALUE(max_grad_norm >= 0.0 && std::isfinite(max_grad_norm),
                    "[DistillationTrainer] max_grad_norm must be 0 (no clipping) or positive and finite, got ",
                    max_grad_norm);
  TORCH_CHECK_VALUE(accumulate >= 1, "[DistillationTrainer] accumulate must be 1 or more, got ", accumulate);
  TORCH_CHECK_VALUE(log_every >= 0, "[DistillationTrainer] log_every must be 0 (no log) or more, got ", log_every);
  TORCH_CHECK_VALUE(processes >= 1, "[DistillationTrainer] processes must be 1 or more, got ", processes);
  TORCH_CHECK_VALUE(selection.patience >= 0, "[DistillationTrainer] patience must be 0 (never stop) or more, got ",
                    selection.patience);
  TORCH_CHECK_VALUE(selection.min_delta >= 0.0 && std::isfinite(selection.min_delta),
                    "[DistillationTrainer] min_delta must be 0 or more and finite, got ", selection.min_delta);
}

DistillationTrainer::DistillationTrainer(Model student, Teacher teacher, OptimizerInterface optimizer,
                                         Objective objective)
    : DistillationTrainer(std::move(student), std::move(teacher), std::move(optimizer), std::move(objective),
                          DistillationTrainerOptions()) {}

DistillationTrainer::DistillationTrainer(Model student, Teacher teacher, OptimizerInterface optimizer,
                                         Objective objective, DistillationTrainerOptions options,
                                         SchedulerInterface scheduler)
    : student_(std::move(student)),
      teacher_(std::move(teacher)),
      optimizer_(std::move(optimizer)),
      objective_(std::move(objective)),
      options_(std::move(options)),
      scheduler_(std::move(scheduler)) {
  options_.validate();
}

StepResult DistillationTrainer::train_step(const Batch& batch) {
  const auto result = scoped(teacher_.enter(), [&] {
    return scoped(enter_model(student_, std::nullopt), [&] { return take_step({batch}); });
  });
  TORCH_CHECK_VALUE(result.has_value(), "[DistillationTrainer] a step must have at least one valid row, got none");
  return *result;
}

StepResult DistillationTrainer::train_step(const torch::Tensor& inputs, const torch::Tensor& labels) {
  return train_step(Batch{inputs, labels});
}

void DistillationTrainer::begin_epoch(const BatchSource& next_batch) {
  if (state_.batch == 0) {
    state_.epoch_random = options_.random.capture();
    state_.epoch_loss = 0.0;
    state_.epoch_steps = 0;
    return;
  }
  // The order of the batches, and what the source draws while it makes them, follow from the random state at the start.
  const auto now = options_.random.capture();
  options_.random.restore(state_.epoch_random);
  for (int64_t i = 0; i < state_.batch; ++i) {
    TORCH_CHECK_VALUE(next_batch().has_value(), "[DistillationTrainer] to go on with epoch ", state_.epoch + 1,
                      " the source must have more than the ", state_.batch, " batches that were done, got ", i);
  }
  options_.random.restore(now);
}

void DistillationTrainer::run_epoch(const BatchSource& next_batch, const Callbacks& callbacks,
                                    const BatchSource& evaluation) {
  begin_epoch(next_batch);
  bool ended = false;
  while (!ended) {
    std::vector<Batch> window;
    while (!ended && std::ssize(window) < options_.accumulate) {
      auto batch = next_batch();
      ended = !batch.has_value();
      if (!ended) {
        window.push_back(options_.prepare ? options_.prepare(std::move(*batch)) : std::move(*batch));
      }
    }
    if (window.empty()) {
      break;
    }
    const auto result = take_step(window);
    state_.batch += std::ssize(window);
    if (!result.has_value()) {
      continue;
    }
    last_ = *result;
    if (callbacks.on_step) {
      callbacks.on_step(state_.step, last_.loss);
    }
    if (stop_ && !ended) {
      return;
    }
  }
  TORCH_CHECK_VALUE(state_.batch > 0, "[DistillationTrainer] an epoch must have at least one batch, got none in epoch ",
                    state_.epoch + 1, " (a source starts anew after its end)");
  end_epoch(callbacks, evaluation);
}

void DistillationTrainer::end_epoch(const Callbacks& callbacks, const BatchSource& evaluation) {
  auto sums = at::tensor({state_.epoch_loss, static_cast<double>(state_.epoch_steps)}, torch::kDouble);
  if (options_.all_reduce_sum) {
    options_.all_reduce_sum(sums);
  }
  TORCH_CHECK_VALUE(state_.epoch_steps > 0 || options_.precision == Precision::float16 || options_.all_reduce_sum,
                    "[DistillationTrainer] an epoch must have at least one valid row, got none in the ", state_.batch,
                    " batches of epoch ", state_.epoch + 1);
  EpochMetrics metrics{state_.epoch + 1, state_.step, sums[0].item<double>() / sums[1].item<double>()};
  if (evaluation) {
    metrics.evaluation = evaluate(evaluation);
  }
  if (callbacks.evaluate) {
    const torch::NoGradGuard no_grad;
    if (!metrics.evaluation.has_value()) {
      metrics.evaluation = Evaluation{std::nan("")};
    }
    metrics.evaluation->metrics = scoped(enter_model(student_, false), [&] { return callbacks.evaluate(); });
  }
  const auto value = selected(options_.selection, metrics.evaluation);

  state_.epoch = metrics.epoch;
  state_.batch = 0;
  state_.history.push_back(metrics);
  if (value.has_value()) {
    const double gain = options_.selection.maximize ? *value - state_.best_value : state_.best_value - *value;
    if (state_.best_epoch == 0 ? !std::isnan(*value) : gain > options_.selection.min_delta) {
      state_.best_epoch = state_.epoch;
      state_.best_value = *value;
    }
  }
  if (scheduler_.advance && scheduler_.when == SchedulerInterface::When::epoch) {
    scheduler_.advance(value);
    ++state_.advances;
  }
  if (callbacks.on_epoch_end) {
    callbacks.on_epoch_end(state_.epoch, metrics);
  }
}

bool DistillationTrainer::out_of_patience() const {
  const int64_t patience = options_.selection.patience;
  return patience > 0 && state_.epoch - state_.best_epoch >= patience;
}

const std::vector<EpochMetrics>& DistillationTrainer::fit(const BatchSource& next_batch, int64_t epochs,
                                                          const Callbacks& callbacks, const BatchSource& evaluation) {
  TORCH_CHECK_VALUE(epochs >= 0, "[DistillationTrainer] epochs must be 0 or more, got ", epochs);
  const auto& metric = options_.selection.metric;
  const bool measured =
      metric == "loss" || metric == "accuracy" ? static_cast<bool>(evaluation) : evaluation || callbacks.evaluate;
  TORCH_CHECK_VALUE(options_.selection.patience == 0 || measured,
                    "[DistillationTrainer] patience needs an evaluation that measures '", metric,
                    "' after each epoch, got none");
  stop_ = false;
  const auto hashes = teacher_.hashes();
  scoped(teacher_.enter(), [&] {
    return scoped(enter_model(student_, true), [&] {
      if (!state_.random.empty()) {
        options_.random.restore(state_.random);
        state_.random.clear();
      }
      while (state_.epoch < epochs && !stop_ && !out_of_patience()) {
        run_epoch(next_batch, callbacks, evaluation);
        teacher_.check_unchanged(hashes);
      }
      return state_.epoch;
    });
  });
  return state_.history;
}

Evaluation DistillationTrainer::evaluate(const BatchSource& next_batch) {
  const torch::NoGradGuard no_grad;
  return scoped(teacher_.enter(), [&] {
    return scoped(enter_model(student_, false), [&] {
      double total = 0.0, rows = 0.0, labelled = 0.0, correct = 0.0, batches = 0.0;
      for (auto batch = next_batch(); batch.has_value(); batch = next_batch()) {
        batches += 1.0;
        const AutocastGuard autocast(options_.device, options_.precision);
        const Outputs target = teacher_(*batch);
        const Outputs outputs = student_.forward(*batch);
        torch::Tensor logits = outputs.logits, labels = batch->labels;
        if (options_.shift && logits.defined() && labels.defined() && labels.dim() >= 1 && labels.size(-1) > 1) {
          logits = logits.narrow(-2, 0, logits.size(-2) - 1);
          labels = labels.narrow(-1, 1, labels.size(-1) - 1);
        }
        if (are_classes(labels, logits)) {
          const torch::Tensor valid = valid_rows(options_, *batch) > 0;
          labelled += valid.sum().item<double>();
          correct += ((logits.argmax(-1) == labels) & valid).sum().item<double>();
        }
        const double count = count_rows(options_, *batch, outputs);
        if (count > 0.0) {
          total += sum_terms(objective_, outputs, target, *batch).value * count;
          rows += count;
        }
      }
      auto sums = at::tensor({total, rows, labelled, correct, batches}, torch::kDouble);
      if (options_.all_reduce_sum) {
        options_.all_reduce_sum(sums);
      }
      const auto* all = sums.const_data_ptr<double>();
      TORCH_CHECK_VALUE(all[1] > 0.0, "[DistillationTrainer] evaluation must have at least one valid row, got ",
                        static_cast<int64_t>(all[4]), " batches and none");
      Evaluation result{all[0] / all[1]};
      if (all[2] > 0.0) {
        result.accuracy = all[3] / all[2];
      }
      return result;
    });
  });
}

TrainerState DistillationTrainer::state() const {
  TrainerState copy = state_;
  if (copy.random.empty()) {
    copy.random = options_.random.capture();
  }
  return copy;
}

void DistillationTrainer::load_state(TrainerState state) {
  state.validate();
  state_ = std::move(state);
}

}  // namespace rarefy::distillation
