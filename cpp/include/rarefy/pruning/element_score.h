#pragma once

#include <ATen/core/Tensor.h>
#include <rarefy/export.h>
#include <rarefy/pruning/element_criterion.h>

#include <cstdint>
#include <string>

// Scores of single weights. Any floating-point type, any strides, any device.
namespace rarefy::pruning {

/// What accumulate() adds to: zeros of value's sizes and device, float64 for float64 and float32 otherwise.
RAREFY_API at::Tensor new_accumulator(const at::Tensor& value);

/// Adds what one backward pass says about a parameter, in place: -w g for Movement, |w g| for Taylor, 1/2 (w g)^2 for
/// Fisher; nothing for the others.
///   gradient     of value's sizes, dense
///   accumulated  from new_accumulator()
/// Throws c10::ValueError for another size, for an undefined gradient, and for a gradient that is not finite (a step
/// that a loss scaler will skip); nothing is added then.
RAREFY_API void accumulate(const ElementCriterion& criterion, const at::Tensor& value, const at::Tensor& gradient,
                           at::Tensor& accumulated);

/// A score per element of `value`: value's sizes, float64 for float64 and float32 otherwise, larger = kept.
///   name         of the parameter; Random depends on it
///   accumulated  for Movement, Taylor and Fisher what accumulate() made. For Activation the norms of the input features:
///                one per value.size(1) elements, one per element of value[0] (a convolution's unfolded inputs), or of
///                value's sizes. Else not used and may be undefined.
///   passes       how many backward passes `accumulated` holds: Taylor and Fisher are means
/// Results do not depend on the number of threads. Throws c10::ValueError when value or accumulated holds NaN or
/// infinity, when `accumulated` is missing or has another size, and for passes < 1.
RAREFY_API at::Tensor element_scores(const ElementCriterion& criterion, const std::string& name,
                                     const at::Tensor& value, const at::Tensor& accumulated = {}, int64_t passes = 1);

}  // namespace rarefy::pruning
