#pragma once

#include <ATen/core/Tensor.h>
#include <rarefy/export.h>

#include <cstdint>
#include <optional>
#include <tuple>

// Ranges, scales and zero points that are searched for on a tensor itself (docs/dev/numerics.md, "Searches"). Every function
// here is also torch.ops.rarefy.<name> in Python. Common to all:
//   x           floating point, any shape and layout, finite and not empty; float64 is rounded to float32.
//   axis        unset: one range for the tensor, results of shape [1]. Set: one per index of that axis.
//   qmin, qmax, symmetric  the grid, as in rarefy/ops/fake_quantize.h: a range becomes a scale by choose_qparams.
// A wrong shape, range or value throws c10::ValueError, a wrong dtype c10::TypeError, a wrong axis c10::IndexError.
namespace rarefy::ops {

/// The range [low, high] with the least sum of importance * |x - x_hat|^norm among those that the search tries: the
/// values' range narrowed to i / steps of it, i = 1, 2, ..., then finer around the best. An asymmetric range with values on
/// both sides of 0 has its ends narrowed together, then each by itself. Never worse than the values' range.
///   norm         in [1, 8].
///   bins         rows of at least 16 * bins values are searched on their histogram (rarefy/ops/histogram.h) in place of the
///                values: the error is then the one expected where values are spread evenly over their bins. 0: never.
///   importance   unset: 1. Else floating point, finite and not negative, of a shape that broadcasts to x's: how much an
///                element's error counts; the values themselves are then searched.
///   power_of_two only scales 2^n.
RAREFY_API std::tuple<at::Tensor, at::Tensor> mse_range(const at::Tensor& x, std::optional<int64_t> axis, int64_t qmin,
                                                        int64_t qmax, bool symmetric, double norm = 2.0,
                                                        int64_t steps = 100, int64_t bins = 2048,
                                                        const std::optional<at::Tensor>& importance = std::nullopt,
                                                        bool power_of_two = false);

/// Scale (float32) and zero point (int32) with a small sum of |x - x_hat|^norm, norm in (0, 1], found together by
/// half-quadratic splitting (Badri & Shaji, 2023): x = x_hat + e with a sparse e, where in turn e shrinks the residual,
///
///   e = sign(r) * max(|r| - |r|^(norm - 1) / beta, 0)     r = (x - x_hat) / scale
///
/// and scale and zero point fit x - e by least squares, beta growing by `kappa`. Stops after `iterations` rounds, or when one
/// brings nothing. The zero point is rounded to a whole number, or stays in the middle when symmetric. Never worse than the
/// values' range, from which it starts.
RAREFY_API std::tuple<at::Tensor, at::Tensor> half_quadratic_qparams(const at::Tensor& x, std::optional<int64_t> axis,
                                                                     int64_t qmin, int64_t qmax, bool symmetric,
                                                                     double norm = 0.7, double beta = 10.0,
                                                                     double kappa = 1.01, int64_t iterations = 20);

/// The range whose scale (by choose_qparams) is a power of two: that of [min_val, max_val] rounded up, so that it holds no
/// less, or to the nearest on a logarithmic scale. The ends are those of the grid; [0, 0] stays. Shapes and errors as in
/// choose_qparams; ends beyond float32's largest value are limited as there.
RAREFY_API std::tuple<at::Tensor, at::Tensor> power_of_two_range(const at::Tensor& min_val, const at::Tensor& max_val,
                                                                 int64_t qmin, int64_t qmax, bool symmetric,
                                                                 bool nearest = false);

/// Keeps the range [low, high] of a batch, or of k batches in order, in place: batch_min and batch_max, float32 [n, channels],
/// n even, (+inf, -inf) where nothing is; batches, int64 [3]: how many were seen, how many are kept, and that every i-th is.
/// Where n are kept, every second one of them goes, and i doubles: memory stays bounded, and what is kept spread evenly over
/// the stream. A range that is not finite is passed over. low and high: float32, [channels] or [k, channels].
RAREFY_API void record_ranges(at::Tensor& batch_min, at::Tensor& batch_max, at::Tensor& batches, const at::Tensor& low,
                              const at::Tensor& high);

/// The means of the ends of the ranges that record_ranges has kept, outliers left out for each end and channel by itself:
///   sigma     set: those farther than `sigma` standard deviations (of all) from the mean are left out.
///   quantile  set: those below the quantile or above 1 - quantile (linear interpolation) are left out; in [0, 0.5).
/// One of the two must be set. float32 [channels]; (+inf, -inf) where nothing was kept.
RAREFY_API std::tuple<at::Tensor, at::Tensor> mean_range(const at::Tensor& batch_min, const at::Tensor& batch_max,
                                                         std::optional<double> sigma, std::optional<double> quantile);

}  // namespace rarefy::ops
