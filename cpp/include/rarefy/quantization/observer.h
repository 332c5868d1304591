#pragma once

#include <rarefy/export.h>
#include <rarefy/quantization/learned.h>

#include <cstdint>
#include <optional>
#include <string>
#include <variant>

// How a range follows the data. Each kind is a value that says what is kept and how the range is chosen; FakeQuantizer
// (rarefy/quantization/fake_quantizer.h) holds the state.
namespace rarefy::quantization {

/// Running minimum and maximum of everything seen.
struct MinMax {
  bool operator==(const MinMax&) const = default;
};

/// Exponential moving average of the batches' minima and maxima: min += constant * (batch_min - min).
struct MovingAverage {
  /// Weight of the newest batch, in (0, 1].
  double constant = 0.01;
  bool operator==(const MovingAverage&) const = default;
};

/// The range of the latest tensor alone: what a weight wants, which is there in full at every step.
struct Latest {
  bool operator==(const Latest&) const = default;
};

/// What a range is searched for in a histogram.
enum class RangeSearch {
  none,  ///< the values seen
  mse,   ///< least mean |x - x_hat|^norm
  kl,    ///< least divergence of the clipped histogram from the quantized one (TensorRT)
};

/// A histogram of everything seen (rarefy/ops/histogram.h), and the range that the search finds in it.
struct Histogram {
  int64_t bins = 2048;  ///< 16 to 65536
  RangeSearch search = RangeSearch::mse;
  double norm = 2.0;  ///< of mse: in [1, 8]
  bool operator==(const Histogram&) const = default;
};

/// The values at `percentile` and 100 - percentile percent of everything seen; of magnitudes for a symmetric range.
struct Percentile {
  double percentile = 99.99;  ///< in (50, 100]
  int64_t bins = 2048;
  bool operator==(const Percentile&) const = default;
};

/// The scale and offset of the greatest signal-to-noise ratio, from a histogram.
struct SQNR {
  double clip_weight = 1.0;  ///< how many times the error of clamped values counts, at least 1 (AIMET takes 3)
  int64_t bins = 2048;
  bool operator==(const SQNR&) const = default;
};

/// The mean of the batches' ranges without outliers.
struct MeanNoOutliers {
  /// What is farther from the mean than this many standard deviations is left out. Unset with `quantile` set; 3 with none set.
  std::optional<double> sigma = std::nullopt;
  /// What is beyond this quantile on either side is left out: in [0, 0.5).
  std::optional<double> quantile = std::nullopt;
  /// Most ranges that are kept: even, 2 to 65536. Of more batches every second, fourth, ... one counts.
  int64_t batches = 1024;
  bool operator==(const MeanNoOutliers&) const = default;
};

/// The range of the latest tensor that gives it the least error, from a search on the tensor itself (ops::mse_range): for
/// weights. FakeQuantizer::importance weighs the elements.
struct MSE {
  double norm = 2.0;    ///< in [1, 8]
  int64_t steps = 100;  ///< ranges of the first round
  int64_t bins = 2048;  ///< rows of 16 * bins values and more are searched on a histogram; 0: never
  bool operator==(const MSE&) const = default;
};

/// Scale and zero point of the latest tensor, together, by half-quadratic splitting (ops::half_quadratic_qparams): for
/// weights.
struct HalfQuadratic {
  double norm = 0.7;  ///< in (0, 1]
  double beta = 10.0;
  double kappa = 1.01;
  int64_t iterations = 20;
  bool operator==(const HalfQuadratic&) const = default;
};

/// How a range follows the data, or how a grid is learned (rarefy/quantization/learned.h).
using Observer = std::variant<MinMax, MovingAverage, Latest, Histogram, Percentile, SQNR, MeanNoOutliers, MSE,
                              HalfQuadratic, LSQ, LSQPlus, PACT, TQT, LearnedBits>;

/// The averaging constant that the operator `observe` takes for it: c for MovingAverage, 1 for what follows the latest tensor,
/// unset for the rest.
RAREFY_API std::optional<double> averaging_constant(const Observer& observer);
/// Whether the range is that of the latest tensor alone (Latest, MSE, HalfQuadratic): such a quantizer belongs to a weight,
/// and observes at every forward.
RAREFY_API bool follows_latest(const Observer& observer);
/// Whether the grid has parameters that are trained (LSQ, LSQPlus, PACT, TQT, LearnedBits).
RAREFY_API bool is_learned(const Observer& observer);
/// The bins of its histogram; unset where it keeps none.
RAREFY_API std::optional<int64_t> histogram_bins(const Observer& observer);
/// Whether its statistics come first and its range later, from all of them: Histogram, Percentile, SQNR, MeanNoOutliers.
RAREFY_API bool chooses_at_end(const Observer& observer);
/// Whether an observer is the range of what it has seen (MinMax, MovingAverage, Latest), which every scheme can have. The others
/// search for the range of a plain grid of integers.
RAREFY_API bool follows_a_range(const Observer& observer);
/// Throws c10::ValueError for a field out of its range.
RAREFY_API void validate(const Observer& observer);
/// "Histogram(bins=2048, search='mse')", as Python writes it.
RAREFY_API std::string str(const Observer& observer);

}  // namespace rarefy::quantization
