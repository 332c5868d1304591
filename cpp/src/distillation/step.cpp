#include "distillation/step.h"

#include <ATen/ops/stack.h>
#include <ATen/ops/tensor.h>
#include <c10/util/Exception.h>

#include <cmath>
#include <numeric>

#include "distillation/autocast.h"
#include "distillation/gradients.h"
#include "distillation/scoped.h"

namespace rarefy::distillation {
namespace {

constexpr double kSmallestScale = 1.0 / 65536;
constexpr int64_t kStepsToGrow =
    2000;  // as torch.amp.GradScaler: doubled after so many good steps, halved after a bad one

torch::Tensor one_number(const std::string& term, const torch::Tensor& value) {
  TORCH_CHECK_VALUE(value.defined() && value.numel() == 1,
                    "[DistillationTrainer] the loss function must return one number, got ",
                    value.defined() ? "a tensor of shape " : "nothing",
                    value.defined() ? value.sizes() : at::IntArrayRef{}, " for the term '", term, "'");
  return value.reshape({});
}

torch::Tensor weighed(const torch::Tensor& value, double weight) { return weight == 1.0 ? value : value * weight; }

/// The part of each term, or of each part of one, in the sum of the norms of their gradients.
std::vector<std::pair<std::string, double>> gradient_shares(const Objective& objective, const TermSums& sums,
                                                            const Outputs& student, const Outputs& teacher,
                                                            const Batch& batch, double scale,
                                                            const std::vector<torch::Tensor>& parameters) {
  std::vector<std::string> names;
  std::vector<torch::Tensor> scalars;
  for (size_t i = 0; i < objective.terms().size(); ++i) {
    const auto& term = objective.terms()[i];
    if (term.parts.empty()) {
      names.push_back(term.name);
      scalars.push_back(weighed(sums.terms[i], scale * term.weight));
    }
    for (const auto& part : term.parts) {
      names.push_back(term.name + "." + part.name);
      scalars.push_back(
          weighed(one_number(part.name, part.function(student, teacher, batch)), scale * term.weight * part.weight));
    }
  }
  const auto norms = gradient_norms(scalars, parameters);
  const double total = std::accumulate(norms.begin(), norms.end(), 0.0);
  std::vector<std::pair<std::string, double>> shares;
  for (size_t i = 0; i < names.size(); ++i) {
    shares.emplace_back(names[i], total > 0.0 ? norms[i] / total : 0.0);
  }
  return shares;
}

}  // namespace

TermSums sum_terms(const Objective& objective, const Outputs& student, const Outputs& teacher, const Batch& batch) {
  TermSums sums;
  std::vector<torch::Tensor> numbers;
  for (const auto& term : objective.terms()) {
    sums.terms.push_back(one_number(term.name, term.function(student, teacher, batch)));
    const auto addend = weighed(sums.terms.back(), term.weight);
    sums.total = sums.total.defined() ? sums.total + addend : addend;
    numbers.push_back(sums.terms.back().detach().to(torch::kDouble));
  }
  // One transfer for all of them.
  numbers.push_back(sums.total.detach().to(torch::kDouble));
  const auto values = at::stack(numbers).to(torch::kCPU);
  const auto* value = values.const_data_ptr<double>();
  for (size_t i = 0; i < objective.terms().size(); ++i) {
    sums.values.emplace_back(objective.terms()[i].name, value[i]);
  }
  sums.value = value[objective.terms().size()];
  return sums;
}

torch::Tensor valid_rows(const DistillationTrainerOptions& options, const Batch& batch) {
  const auto& labels = batch.labels;
  torch::Tensor valid;
  if (labels.defined() && labels.scalar_type() == torch::kLong && labels.dim() >= 1) {
    valid = labels != options.ignore_index;
  }
  if (options.row_weights) {
    const auto weights = options.row_weights(batch).to(torch::kDouble);
    TORCH_CHECK_VALUE(!valid.defined() || valid.sizes() == weights.sizes(),
                      "[DistillationTrainer] masks and weights must have the shape of the labels, ", labels.sizes(),
                      ", got ", weights.sizes());
    valid = valid.defined() ? weights * valid : weights;
  }
  return valid.defined() && options.shift && valid.size(-1) > 1 ? valid.narrow(-1, 1, valid.size(-1) - 1) : valid;
}

double count_rows(const DistillationTrainerOptions& options, const Batch& batch, const Outputs& outputs) {
  if (options.count) {
    return options.count(batch);
  }
  const auto valid = valid_rows(options, batch);
  if (valid.defined()) {
    return valid.sum().item<double>();
  }
  if (outputs.logits.defined()) {
    const auto& logits = outputs.logits;
    return logits.dim() == 0 ? 1.0 : static_cast<double>(logits.numel() / std::max<int64_t>(1, logits.size(-1)));
  }
  TORCH_CHECK_VALUE(batch.inputs.defined() && batch.inputs.dim() >= 1,
                    "[DistillationTrainer] without labels the batch's inputs must have a first dimension to count");
  return static_cast<double>(batch.inputs.size(0));
}

std::vector<double> DistillationTrainer::factors(const std::vector<Batch>& window) const {
  std::vector<double> counts;
  for (const auto& batch : window) {
    counts.push_back(count_rows(options_, batch));
  }
  auto total = at::tensor({std::accumulate(counts.begin(), counts.end(), 0.0)}, torch::kDouble);
  if (options_.all_reduce_sum) {
    options_.all_reduce_sum(total);
  }
  const double sum = total.item<double>();
  if (sum == 0.0) {
    return {};
  }
  TORCH_CHECK_VALUE(std::isfinite(sum) && sum > 0.0,
                    "[DistillationTrainer] the number of valid rows must be positive and finite, got ", sum,
                    " at step ", state_.step + 1);
  if (window.size() == 1 && !options_.all_reduce_sum) {
    return {1.0};  // to the bit
  }
  for (double& value : counts) {
    value *= static_cast<double>(options_.processes) / sum;  // processes average their gradients
  }
  return counts;
}

double DistillationTrainer::accumulate(const Batch& batch, double factor, bool measure, StepResult& result) {
  torch::Tensor total;
  double value = 0.0;
  {
    const AutocastGuard autocast(options_.device, options_.precision);
    const Outputs target = teacher_(batch);
    const Outputs outputs = student_.forward(batch);
    const bool counted = options_.count || options_.row_weights || batch.labels.defined();
    TORCH_CHECK_VALUE(counted || factor == 1.0 || !outputs.logits.defined() || outputs.logits.dim() < 3,
                      "[DistillationTrainer] sequences without labels must be counted to be accumulated (count, or a "
                      "mask), got logits of shape ",
                      outputs.logits.sizes());
    if (factor == 0.0) {  // other processes wait for this one's gradients: zeros
      TORCH_CHECK_VALUE(outputs.logits.defined(), "[DistillationTrainer] a batch without valid rows needs logits");
      total = outputs.logits.sum() * 0.0;
    } else {
      const TermSums sums = sum_terms(objective_, outputs, target, batch);
      total = sums.total;
      value = sums.value;
      result.terms.resize(sums.values.size());
      for (size_t i = 0; i < sums.values.size(); ++i) {
        result.terms[i].first = sums.values[i].first;
        result.terms[i].second += factor * sums.values[i].second;
      }
      if (measure && result.shares.empty()) {
        const double scale = options_.precision == Precision::float16 ? state_.loss_scale : 1.0;
        result.shares = gradient_shares(objective_, sums, outputs, target, batch, scale, optimizer_.parameters());
      }
    }
  }
  const bool scaled = options_.precision == Precision::float16;
  TORCH_CHECK_VALUE(std::isfinite(value) || scaled, "[DistillationTrainer] the loss must be finite, got ", value,
                    " at step ", result.step, "; the parameters are those after step ", state_.step);
  const double scale = factor == 0.0 ? 1.0 : factor * (scaled ? state_.loss_scale : 1.0);
  weighed(total, scale).backward();
  return factor * value;
}

std::optional<StepResult> DistillationTrainer::take_step(const std::vector<Batch>& window) {
  const auto weights = factors(window);
  if (weights.empty()) {
    TORCH_WARN_ONCE("[DistillationTrainer] batches without a valid row are passed over, first behind step ",
                    state_.step);
    return std::nullopt;
  }
  StepResult result{state_.step + 1, 0.0};
  const bool logged = options_.log_every > 0 && (result.step == 1 || result.step % options_.log_every == 0);
  optimizer_.zero_grad();
  for (size_t i = 0; i < window.size(); ++i) {
    if (weights[i] == 0.0 && !options_.all_reduce_sum) {
      continue;
    }
    const bool waits = i + 1 < window.size() && student_.pause_sync;
    result.loss += scoped(waits ? student_.pause_sync() : Model::Restore([] {}),
                          [&] { return accumulate(window[i], weights[i], logged, result); });
  }
  apply_gradients(result);
  ++state_.step;
  if (!result.skipped) {
    state_.epoch_loss += result.loss;
    ++state_.epoch_steps;
  }
  if (logged) {
    state_.log.push_back(result);
  }
  return result;
}

void DistillationTrainer::apply_gradients(StepResult& result) {
  if (options_.precision == Precision::float16) {
    if (!unscale(gradients_of(optimizer_.parameters()), state_.loss_scale)) {
      result.skipped = true;
      state_.loss_scale /= 2.0;
      state_.good_steps = 0;
      TORCH_CHECK_VALUE(state_.loss_scale >= kSmallestScale,
                        "[DistillationTrainer] the gradient must be finite at some loss scale, and is not at ",
                        state_.loss_scale * 2.0, ", step ", result.step, "; the parameters are those after step ",
                        state_.step);
      return;
    }
    if (++state_.good_steps == kStepsToGrow) {
      state_.loss_scale *= 2.0;
      state_.good_steps = 0;
    }
  }
  if (options_.max_grad_norm > 0.0) {
    result.grad_norm = clip_norm(gradients_of(optimizer_.parameters()), options_.max_grad_norm);
    TORCH_CHECK_VALUE(std::isfinite(*result.grad_norm),
                      "[DistillationTrainer] the gradient's norm must be finite, got ", *result.grad_norm, " at step ",
                      result.step, "; the parameters are those after step ", state_.step);
  }
  optimizer_.step();
  if (scheduler_.advance && scheduler_.when == SchedulerInterface::When::step) {
    scheduler_.advance(std::nullopt);
    ++state_.advances;
  }
  if (student_.after_step) {
    student_.after_step();
  }
  teacher_.after_step();
}

}  // namespace rarefy::distillation
