// Ranges whose scale is a power of two.
#pragma once

#include "ops/qparams.h"

namespace rarefy {

struct ValueRange {
  float low;
  float high;
};

/// See power_of_two_range in rarefy/ops/range_search.h.
inline ValueRange power_of_two_range(ValueRange range, int64_t qmin, int64_t qmax, bool symmetric, bool nearest) {
  if (!(range.low < 0.0f) && !(range.high > 0.0f)) {
    return range;
  }
  const float scale = range_to_qparams(range.low, range.high, qmin, qmax, symmetric).scale;
  const int64_t middle = (qmin + qmax + 1) >> 1;
  const auto reach = static_cast<double>(symmetric ? middle - qmin : qmax - qmin);
  int exponent;
  const float fraction = frexpf(scale, &exponent);  // in [1/2, 1)
  if (fraction == 0.5f || (nearest && fraction < 0.70710678f)) {
    --exponent;
  }
  while (ldexp(reach, exponent) > kLargestGridValue) {
    --exponent;
  }
  const double step = ldexp(1.0, exponent);
  if (symmetric) {
    const auto end = static_cast<float>(static_cast<double>(qmax - middle) * step);
    return {-end, end};
  }
  const double low = range.low < 0.0f ? range.low : 0.0;
  const double wanted = static_cast<double>(qmin) - rint(low / step);
  const double zero_point = wanted < static_cast<double>(qmin)   ? static_cast<double>(qmin)
                            : wanted > static_cast<double>(qmax) ? static_cast<double>(qmax)
                                                                 : wanted;
  return {static_cast<float>((static_cast<double>(qmin) - zero_point) * step),
          static_cast<float>((static_cast<double>(qmax) - zero_point) * step)};
}

}  // namespace rarefy
