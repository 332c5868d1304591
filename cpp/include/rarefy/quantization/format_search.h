#pragma once

#include <ATen/core/Tensor.h>
#include <rarefy/export.h>
#include <rarefy/quantization/scheme.h>

#include <optional>
#include <string>
#include <utility>

// Scales that are searched for, for every scheme that has scales of its own: what rarefy/ops/range_search.h and histogram.h do for
// one grid of integers per tensor or channel (docs/dev/numerics.md, "Searches for formats").
namespace rarefy::quantization {

/// Why an observer cannot serve a scheme; unset when it can. MinMax, MovingAverage and Latest serve all.
///   dynamic schemes, codebooks   what is rounded gives the scales itself: there is nothing to search for
///   HalfQuadratic                for integers whose scale is free: no minifloats, no powers of two
///   Histogram(search=kl)         for integers
RAREFY_API std::optional<std::string> why_not_observed(const Scheme& scheme, const Observer& observer);

/// Scales (float32) and zero points (int32) of a weight, and the ranges [low, high] that they are of, in the shape of
/// scheme.scale_shape(x.sizes()).
struct FoundScales {
  at::Tensor scale, zero_point, low, high;
};

/// The scales with which an observer that searches (MSE, HalfQuadratic) gives x the least error, one search for each that the
/// scheme has: for integers ops::mse_range and ops::half_quadratic_qparams of each group or block, for minifloats the same
/// narrowing of the range with the error of the cast. With a power of two as the scale only those are tried.
///   x           floating point, finite and not empty.
///   importance  for MSE: of a shape that broadcasts to x's, finite and not negative; unset for 1.
/// Throws c10::ValueError for what why_not_observed names, an observer that does not search, and as those operators do.
/// torch.ops.rarefy.search_scheme(x, scheme, "mse" or "half_quadratic", parameters, importance) gives the four tensors, with the
/// scheme as JSON and the observer's fields in order as parameters.
RAREFY_API FoundScales search_scheme(const at::Tensor& x, const Scheme& scheme, const Observer& observer,
                                     const std::optional<at::Tensor>& importance = std::nullopt);

/// As ops::choose_range_from_histogram, for a scheme: `method` "minmax", "mse", "percentile", "sqnr" or "kl" with its parameter.
/// For minifloats the errors of "mse" and "sqnr" are those of the cast, with four values for each bin, spread evenly over it.
/// torch.ops.rarefy.scheme_range_from_histogram is the same with the scheme as JSON.
RAREFY_API std::pair<at::Tensor, at::Tensor> scheme_range_from_histogram(const at::Tensor& hist,
                                                                         const at::Tensor& hist_min,
                                                                         const at::Tensor& hist_max,
                                                                         const Scheme& scheme,
                                                                         const std::string& method, double parameter);

}  // namespace rarefy::quantization
