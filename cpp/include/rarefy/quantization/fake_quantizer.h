#pragma once

#include <rarefy/export.h>
#include <rarefy/quantization/range_statistics.h>
#include <rarefy/quantization/scheme.h>
#include <torch/nn/cloneable.h>
#include <torch/nn/pimpl.h>

#include <functional>
#include <map>
#include <memory>
#include <string>
#include <vector>

namespace rarefy::quantization {

class ObservedOnce;

/// Options of a FakeQuantizer.
struct FakeQuantizerOptions {
  Scheme scheme;
  Observer observer = MovingAverage{};
  /// Number of channels for PerChannel; ignored for PerTensor.
  int64_t channels = 1;
  /// Shape of the weight that is quantized, from which the shapes of scales per group or block and of codebooks follow; unset
  /// for activations.
  std::vector<int64_t> shape = {};
};

/// Observes ranges and rounds to the grid, in floating point, with the clipped straight-through gradient.
///
/// Buffers of shape [1] or [channels]: scale (float32), zero_point (int32), min_val and max_val (float32, +inf and -inf
/// until something was observed). skipped (int64 [1]) counts the batches that held a NaN or an infinity: their range is left
/// out, and they are rounded to the grid so far (that of [0, 0], scale 1, while there is none).
///
/// A scheme that is not plain (Scheme::is_plain) is simulated by the operators of rarefy/ops/formats.h. Its scale, zero_point,
/// min_val and max_val have the shape that Scheme::scale_shape gives for a weight; with a dynamic scheme they stay as they are and
/// nothing is observed. A codebook is a buffer `codebook` (float32, scale_shape and the entries; [entries] per tensor), made by
/// k-means at the first forward and kept. Stochastic rounding has the buffer `draws` (int64 [2]: seed, number of forwards).
///
/// A scheme with noise (rarefy/quantization/noise.h) has it while is_training() and quantize are set.
///
/// Observers that choose their range from statistics (chooses_at_end) keep these in the module `statistics`. The range is chosen
/// at the first use after something was observed: once, at the end of a calibration; at every step of training. Which observers
/// serve which schemes is what why_not_observed (rarefy/quantization/format_search.h) says.
///
/// A learned grid (rarefy/quantization/learned.h) has parameters in `learned`, and `scale` is one of them for LSQ and LSQPlus; its
/// min_val and max_val are the range that training began with. It starts from the first batch that is rounded in training, from
/// all batches of a calibration (the mean of their ranges), or from the weight, and is the same for all processes. From then on
/// `observe` does not matter: a parameter that does not require a gradient is frozen.
///
/// A weight (an observer that follows the latest tensor, or a learned grid with a `shape`) is observed at every forward; an activation while training, and in
/// calibration (observe without quantize) always, but not inside of a backward pass: such a forward recomputes activations
/// (gradient checkpointing).
class RAREFY_API FakeQuantizerImpl : public torch::nn::Cloneable<FakeQuantizerImpl> {
 public:
  /// Throws c10::ValueError for an invalid scheme or observer, an observer that does not serve the scheme, or channels < 1.
  explicit FakeQuantizerImpl(FakeQuantizerOptions options);
  void reset() override;
  void pretty_print(std::ostream& stream) const override;

  /// x on the grid when `quantize`, x itself otherwise; any shape that the scheme's axis fits.
  /// The first skipped batch is told by a warning (on the CPU, where that costs nothing).
  /// Throws c10::ValueError when it quantizes without observing and has never observed anything; for a weight on the CPU that
  /// is not finite.
  torch::Tensor forward(const torch::Tensor& x);

  /// Observes x where forward(x) would, so that scale and zero_point are what forward(x) would round with; rounds nothing,
  /// as integer execution does that itself. With `factor`, what is observed is x * factor (one value per index of axis 0).
  /// Throws as forward.
  void update(const torch::Tensor& x, const torch::Tensor& factor = {});

  /// The integers of x, int8 or uint8, with the parameters as they are.
  torch::Tensor quantize_to_integer(const torch::Tensor& x) const;

  /// True once something was observed.
  bool calibrated() const;

  /// Chooses the range from the statistics, where something was observed since that was last done.
  void settle() const;

  /// Takes over min_val, max_val, skipped and statistics by name, as statistics_for (rarefy/quantization/statistics.h) gives
  /// them, and chooses the range.
  void take_statistics(const std::map<std::string, torch::Tensor>& buffers);
  /// Forgets the statistics and keeps the range: the observer becomes MinMax, or Latest where it follows the latest tensor; the
  /// scheme loses its noise. What conversion does.
  void drop_statistics();

  /// Takes notice of buffers that were written to from outside, as by a checkpoint that was loaded.
  void refresh();
  void load(torch::serialize::InputArchive& archive) override;

  /// Makes range, statistics and count those of all processes (smallest minimum, greatest maximum, greatest count; the sum of
  /// histograms), by the functions below, which must be set: what calibration does at its end, where batches per process may
  /// differ in number.
  void merge_over_processes();

  /// Whether it belongs to a weight: the observer follows the latest tensor, or it is learned for a tensor of a shape.
  bool is_weight() const {
    return follows_latest(options.observer) || (!options.shape.empty() && is_learned(options.observer));
  }
  /// Makes the scheme that of the width that LearnedBits has come to; nothing for others. What conversion does first.
  void settle_bits();
  /// The greatest width that LearnedBits may have: that of the scheme it was made with.
  int64_t greatest_bits() const;

  FakeQuantizerOptions options;
  bool observe = true;
  bool quantize = true;
  /// "fc1.quant.input", say; for messages.
  std::string name;
  /// When set, activations are observed over several processes: called with one float32 tensor, of which it takes the
  /// element-wise maximum over all of them, in place. set_process_group (rarefy/quantization/distributed.h) sets it.
  std::function<void(torch::Tensor&)> all_reduce_max;
  /// The same for the sum of an int64 tensor, and for the tensors of all processes, which have one shape; for observers with
  /// statistics.
  std::function<void(torch::Tensor&)> all_reduce_sum;
  std::function<std::vector<torch::Tensor>(const torch::Tensor&)> all_gather;
  /// How much an element's error counts to MSE: of a shape that broadcasts to the weight's, not negative. No buffer.
  torch::Tensor importance;
  torch::Tensor scale, zero_point, min_val, max_val, skipped;
  torch::Tensor codebook, draws;  // undefined where the scheme has none
  /// The parameters of a learned grid by name: scale, offset, alpha, log2_threshold, bits, bound. Empty for others.
  std::map<std::string, torch::Tensor> learned;
  /// Null unless the observer keeps more than a range.
  RangeStatistics statistics{nullptr};

  /// When set, told of every tensor that forward is given.
  std::function<void(const torch::Tensor&)> watch;
  /// Set by calibrate while it runs.
  std::shared_ptr<ObservedOnce> observed_once;

 private:
  friend class ObservedOnce;
  torch::Tensor round(const torch::Tensor& x);
  void register_learned(c10::IntArrayRef size);
  std::vector<torch::Tensor> learned_values() const;
  torch::Tensor forward_learned(const torch::Tensor& x);
  void start_learned(const torch::Tensor& x);
  void start_from(const torch::Tensor& low, const torch::Tensor& high) const;
  void average_over_processes(torch::Tensor& low, torch::Tensor& high, bool all);
  const Scheme& widest() const;
  void settle_learned() const;
  void freeze_learned();
  void register_format_buffers();
  torch::Tensor forward_format(const torch::Tensor& x);
  void observe_weight_format(const torch::Tensor& x);
  void search_format(const torch::Tensor& x);
  void derive_format_scale() const;
  bool was_searched(const torch::Tensor& weight) const;
  void note_searched(const torch::Tensor& weight);
  bool observes_now() const;
  bool is_recomputing() const;
  void require_calibrated();
  torch::Tensor scaled_ends(const torch::Tensor& x, const torch::Tensor& factor) const;
  void observe_alone(const torch::Tensor& x, std::optional<int64_t> axis);
  void search(const torch::Tensor& weight, std::optional<int64_t> axis);
  void observe_over_processes(const torch::Tensor& x);
  void chosen_after_observing();
  void require_all_processes() const;
  torch::Tensor merged(const torch::Tensor& low, const torch::Tensor& high, const torch::Tensor& count);
  void take(const torch::Tensor& merged, std::optional<double> constant);
  void take(const torch::Tensor& low, const torch::Tensor& high, std::optional<double> constant) const;
  void tell_skipped(const torch::Tensor& x);

  bool told_ = false;              // of the first skipped batch
  bool known_calibrated_ = false;  // saves reading the buffers back at every forward
  mutable bool pending_ = false;   // observed since the range was last chosen
  std::optional<Scheme> widest_;   // the scheme before settle_bits
  int64_t started_from_ = 0;       // batches whose mean range a learned grid has started from
  // What a weight's range was searched on, so that a search is made once for the same values.
  c10::weak_intrusive_ptr<c10::TensorImpl, c10::UndefinedTensorImpl> searched_{
      c10::intrusive_ptr<c10::TensorImpl, c10::UndefinedTensorImpl>()};
  int64_t searched_version_ = 0;
};
TORCH_MODULE(FakeQuantizer);

}  // namespace rarefy::quantization
