#pragma once

#include <ATen/core/Tensor.h>
#include <rarefy/export.h>

#include <cstdint>
#include <optional>
#include <string>
#include <tuple>

// Histograms of streams, whose range grows without moving a count to a wrong bin, and ranges chosen from them
// (docs/dev/numerics.md, "Histograms"). A bin's width is a power of two and 0 is always an edge, so that a wider bin is the
// union of two:
//
//   place of x    g = trunc(|x| / 2^k) for x >= 0, and -1 - trunc(|x| / 2^k) for x < 0
//   bin of x      g - base
//
// k and base follow from the least and the greatest value seen and from the number of bins alone: k is the smallest whole
// number >= -100 for which the places of [min(least, 0), max(greatest, 0)] are at most `bins` many, and base is the lowest of
// these places. The counts are therefore those of all values at once, whatever their order, batches, threads or processes;
// more than half of the bins are in use.
//
// Every function here is also torch.ops.rarefy.<name> in Python. Common to all:
//   hist              int64, contiguous, [rows, bins]: one histogram per row, of 16 to 65536 bins.
//   hist_min, hist_max  float32, contiguous, [rows]: the least and the greatest value seen; (+inf, -inf) for none.
// A wrong shape, range or value throws c10::ValueError, a wrong dtype c10::TypeError, a wrong axis c10::IndexError.
namespace rarefy::ops {

/// Counts the values of x, in place.
///   x        floating point, any shape and layout; float64 is rounded to float32.
///   skipped  int64, one element: batches that held a NaN or an infinity. Such a batch counts here and nowhere else.
///   axis     unset: one row. Set: one row per index of that axis.
/// Throws when x is empty; then nothing has changed.
RAREFY_API void histogram_observe(const at::Tensor& x, at::Tensor& hist, at::Tensor& hist_min, at::Tensor& hist_max,
                                  at::Tensor& skipped, std::optional<int64_t> axis);

/// The same by torch's operators alone, for devices without a kernel; waits for the device.
RAREFY_API void histogram_observe_anywhere(const at::Tensor& x, at::Tensor& hist, at::Tensor& hist_min,
                                           at::Tensor& hist_max, at::Tensor& skipped, std::optional<int64_t> axis);

/// Adds the counts of another histogram of as many rows and bins, in place: what one over both streams would hold.
RAREFY_API void histogram_add(at::Tensor& hist, at::Tensor& hist_min, at::Tensor& hist_max, const at::Tensor& other,
                              const at::Tensor& other_min, const at::Tensor& other_max);

/// The range [low, high] of each row, float32 [rows], that quantizes it best to [qmin, qmax].
///   method      "minmax"      the values seen.
///               "percentile"  the values at `parameter` and 100 - parameter percent, parameter in (50, 100]; for a symmetric
///                             range, plus and minus the magnitude at `parameter` percent.
///               "mse"         least expected |x - x_hat|^parameter, parameter in [1, 8], values taken as spread evenly over
///                             their bin.
///               "sqnr"        least noise: the squared error, that of clamped values beyond the half step that rounding
///                             may cost counted `parameter` >= 1 times.
///               "kl"          least Kullback-Leibler divergence of the clipped histogram from its quantized form (Migacz,
///                             "8-bit inference with TensorRT", 2017); parameter is not used.
///   power_of_two  only scales 2^n: the search tries no others, and the other methods widen the range.
/// mse and sqnr are never worse than the values seen, by the same measure. A row without counts gives (+inf, -inf).
RAREFY_API std::tuple<at::Tensor, at::Tensor> choose_range_from_histogram(
    const at::Tensor& hist, const at::Tensor& hist_min, const at::Tensor& hist_max, const std::string& method,
    double parameter, int64_t qmin, int64_t qmax, bool symmetric, bool power_of_two);

}  // namespace rarefy::ops
