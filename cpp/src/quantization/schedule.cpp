#include <c10/util/Exception.h>
#include <fmt/format.h>
#include <rarefy/quantization/prepare.h>
#include <rarefy/quantization/schedule.h>

namespace rarefy::quantization {

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
  const auto flags = options_.flags_at(steps_);
  set_state(model, flags.observe, flags.quantize);
  ++steps_;
}

void QATSchedule::apply(torch::nn::Module& model) const {
  const auto flags = options_.flags_at(steps_ == 0 ? 0 : steps_ - 1);
  set_state(model, flags.observe, flags.quantize);
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
