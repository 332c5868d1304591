#include <c10/util/Exception.h>
#include <fmt/format.h>
#include <rarefy/nn/conv_bn.h>
#include <rarefy/quantization/batch_norm.h>
#include <rarefy/quantization/prepare.h>
#include <rarefy/quantization/schedule.h>
#include <torch/nn/modules/batchnorm.h>

#include <algorithm>

namespace rarefy::quantization {
namespace {

bool folds_batch_norm(const torch::nn::Module& model) {
  const auto modules = model.modules();
  return std::any_of(modules.begin(), modules.end(), [](const auto& module) {
    return dynamic_cast<const nn::FoldedBatchNorm1dImpl*>(module.get()) != nullptr ||
           dynamic_cast<const nn::FoldedBatchNorm2dImpl*>(module.get()) != nullptr ||
           dynamic_cast<const nn::FoldedBatchNorm3dImpl*>(module.get()) != nullptr;
  });
}

void set_flags(torch::nn::Module& model, const QATFlags& flags, bool with_batch_norm) {
  TORCH_CHECK_VALUE(!with_batch_norm || folds_batch_norm(model),
                    "[QATSchedule] freeze_batch_norm_at needs a model with a layer that folds a batch normalization "
                    "(rarefy::nn::ConvBn2d), got none");
  set_state(model, flags.observe, flags.quantize);
  if (with_batch_norm) {
    freeze_batch_norm(model, flags.freeze_batch_norm);
  }
}

}  // namespace

void QATScheduleOptions::validate() const {
  TORCH_CHECK_VALUE(observe_from >= 0, "[QATSchedule] observe_from must not be negative, got ", observe_from);
  TORCH_CHECK_VALUE(quantize_from >= observe_from, "[QATSchedule] quantize_from must not be before observe_from (",
                    observe_from, "), got ", quantize_from);
  TORCH_CHECK_VALUE(!freeze_observers_at.has_value() || *freeze_observers_at > observe_from,
                    "[QATSchedule] freeze_observers_at must be after observe_from (", observe_from, "), got ",
                    freeze_observers_at.value_or(0));
  TORCH_CHECK_VALUE(freeze_batch_norm_at.value_or(0) >= 0,
                    "[QATSchedule] freeze_batch_norm_at must not be negative, got ", freeze_batch_norm_at.value_or(0));
}

QATFlags QATScheduleOptions::flags_at(int64_t step) const {
  return {.observe = step >= observe_from && !(freeze_observers_at.has_value() && step >= *freeze_observers_at),
          .quantize = step >= quantize_from,
          .freeze_batch_norm = freeze_batch_norm_at.has_value() && step >= *freeze_batch_norm_at};
}

std::string QATScheduleOptions::to_string() const {
  const auto shown = [](std::optional<int64_t> step) { return step.has_value() ? std::to_string(*step) : "None"; };
  return fmt::format("observe_from={}, quantize_from={}, freeze_observers_at={}, freeze_batch_norm_at={}", observe_from,
                     quantize_from, shown(freeze_observers_at), shown(freeze_batch_norm_at));
}

QATSchedule::QATSchedule(QATScheduleOptions options) : options_(options) { options_.validate(); }

void QATSchedule::step(torch::nn::Module& model) {
  set_flags(model, options_.flags_at(steps_), options_.freeze_batch_norm_at.has_value());
  ++steps_;
}

void QATSchedule::apply(torch::nn::Module& model) const {
  set_flags(model, options_.flags_at(steps_ == 0 ? 0 : steps_ - 1), options_.freeze_batch_norm_at.has_value());
}

void QATSchedule::save(torch::serialize::OutputArchive& archive) const { archive.write("steps", c10::IValue(steps_)); }

void QATSchedule::load(torch::serialize::InputArchive& archive) {
  c10::IValue steps;
  archive.read("steps", steps);
  TORCH_CHECK_VALUE(steps.isInt() && steps.toInt() >= 0, "[QATSchedule] the archive must hold a number of steps, got ",
                    steps);
  steps_ = steps.toInt();
}

std::string QATSchedule::to_string() const {
  return fmt::format("QATSchedule({}): {} steps begun", options_.to_string(), steps_);
}

}  // namespace rarefy::quantization
