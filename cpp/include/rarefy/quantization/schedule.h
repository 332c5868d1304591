#pragma once

#include <rarefy/export.h>
#include <torch/nn/module.h>
#include <torch/serialize/archive.h>

#include <cstdint>
#include <optional>
#include <string>

namespace rarefy::quantization {

/// What the quantizers and batch normalizations of a model do in one training step.
struct QATFlags {
  bool observe = true;
  bool quantize = true;
  bool freeze_batch_norm = false;
  bool operator==(const QATFlags&) const = default;
};

/// When quantization-aware training begins to observe, begins to quantize, and freezes what it has learned. Steps are
/// training steps, counted from 0.
struct RAREFY_API QATScheduleOptions {
  int64_t observe_from = 0;   // >= 0; ranges follow the data from this step on
  int64_t quantize_from = 0;  // >= observe_from; floating point before it
  std::optional<int64_t> freeze_observers_at =
      std::nullopt;  // > observe_from; scales and zero points stay from this step on
  std::optional<int64_t> freeze_batch_norm_at =
      std::nullopt;  // >= 0; running statistics are used and kept from this step on

  /// Throws c10::ValueError when a field is out of range.
  void validate() const;
  QATFlags flags_at(int64_t step) const;
  /// "observe_from=0, quantize_from=100, ..."
  std::string to_string() const;
  bool operator==(const QATScheduleOptions&) const = default;
};

/// Sets the switches of a prepared model step by step. Switches are host booleans: nothing is read from a device.
///
///   QATSchedule schedule({.quantize_from = 100, .freeze_observers_at = 1000});
///   for (...) { schedule.step(*model); /* forward, backward, optimizer */ }
class RAREFY_API QATSchedule {
 public:
  /// Throws c10::ValueError for invalid options.
  explicit QATSchedule(QATScheduleOptions options);

  /// Call it once at the beginning of each training step, in training mode: sets the model's switches for the step, then
  /// counts it. Frozen batch normalizations are put into evaluation mode, which model.train() ends until the next step().
  /// Throws c10::ValueError when the model is not prepared, or has no batch normalization to freeze; the step is not counted.
  void step(torch::nn::Module& model);
  /// Sets the switches of the step that was counted last (of step 0 before the first), for a model that was loaded.
  void apply(torch::nn::Module& model) const;

  const QATScheduleOptions& options() const { return options_; }
  /// Training steps begun.
  int64_t steps() const { return steps_; }
  /// The count of steps; the options are the constructor's.
  void save(torch::serialize::OutputArchive& archive) const;
  /// Continues where save() was called. Throws c10::ValueError for a negative count.
  void load(torch::serialize::InputArchive& archive);
  /// "QATSchedule(observe_from=0, ...): 12 steps begun"
  std::string to_string() const;

 private:
  QATScheduleOptions options_;
  int64_t steps_ = 0;
};

}  // namespace rarefy::quantization
