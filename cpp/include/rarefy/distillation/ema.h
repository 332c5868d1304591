#pragma once

#include <rarefy/export.h>
#include <torch/nn/module.h>
#include <torch/types.h>

#include <cstdint>
#include <vector>

namespace rarefy::distillation {

struct RAREFY_API EmaOptions {
  double decay = 0.999;  // in [0, 1): the share that the average keeps in one update
  double warmup =
      1.0;  // >= 0; the decay of update t (0 for the first) is min(decay, t / (t + warmup)); 0: decay from the start

  /// Throws c10::ValueError for a field out of range.
  void validate() const;
};

/// Exponential moving averages of lists of tensors, the teacher of Mean Teacher (Tarvainen & Valpola, 2017,
/// arXiv:1703.01780):
///
///   average <- average + (1 - d_t) (value - average),    d_t = min(decay, t / (t + warmup)),    t = 0, 1, 2, ...
///
/// With a warmup of 1 the average is the plain mean of all values until decay is reached, so that the start, where weights
/// are random, is forgotten soon. The averages live with the caller; the object counts the updates.
class RAREFY_API Ema {
 public:
  /// Throws c10::ValueError for options out of range.
  explicit Ema(EmaOptions options = {});

  /// One update of every average, in place and without gradients.
  ///   averages  float32 or float64 (a weight of 0.001 is lost in the rounding of 16 bits)
  ///   values    as many, of the same shapes, floating point
  /// Throws c10::ValueError and c10::TypeError, before anything has changed.
  void update(const std::vector<torch::Tensor>& averages, const std::vector<torch::Tensor>& values);

  /// The same for the parameters of a module, matched by name, and copies of its buffers (running statistics, ranges of
  /// quantizers, masks of a pruner, which are applied to the average). Throws c10::ValueError where names or shapes differ, before anything has changed.
  void update(torch::nn::Module& average, const torch::nn::Module& value);

  /// The decay of the next update.
  double next_decay() const;

  const EmaOptions& options() const { return options_; }
  /// How many updates are done.
  int64_t updates() const { return updates_; }
  /// Continues where a saved run stood. Throws c10::ValueError for a negative number.
  void set_updates(int64_t updates);

 private:
  EmaOptions options_;
  int64_t updates_ = 0;
};

}  // namespace rarefy::distillation
