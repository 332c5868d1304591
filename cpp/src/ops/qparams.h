// From a range to a scale and a zero point: one formula for the CPU and the CUDA kernels.
#pragma once

#include <math.h>
#include <stdint.h>

#if defined(__CUDACC__)
#define RAREFY_HOST_DEVICE __host__ __device__
#else
#define RAREFY_HOST_DEVICE
#endif

namespace rarefy {

struct QParams {
  float scale;
  int32_t zero_point;
};

/// Smallest scale that is handed out: the product of two of them is still a normal float.
constexpr float kSmallestScale = 0x1p-60f;
/// Largest distance from 0 to a grid point: no grid point rounds to infinity.
constexpr double kLargestGridValue = 0x1.fffep127;

/// (1 - constant) * average + constant * value, the arithmetic in double and rounded once to float. A constant of 1 gives
/// the value itself, and no pair of finite floats overflows. Compiled without fused multiply-add on every device.
RAREFY_HOST_DEVICE inline float moving_average(float average, float value, double constant) {
  return static_cast<float>((1.0 - constant) * static_cast<double>(average) + constant * static_cast<double>(value));
}

/// See choose_qparams in rarefy/ops/fake_quantize.h. Computed in double, so that max - min cannot overflow.
/// A symmetric range has at least three integers.
RAREFY_HOST_DEVICE inline QParams range_to_qparams(float min_val, float max_val, int64_t qmin, int64_t qmax,
                                                   bool symmetric) {
  const double low = min_val < 0.0f ? min_val : 0.0;
  const double high = max_val > 0.0f ? max_val : 0.0;
  QParams out;
  double scale, reach;  // reach: steps from 0 to the farthest grid point, at most
  if (symmetric) {
    const int64_t middle = (qmin + qmax + 1) >> 1;
    out.zero_point = static_cast<int32_t>(middle);
    scale = (-low > high ? -low : high) / static_cast<double>(qmax - middle);
    reach = static_cast<double>(middle - qmin);
  } else {
    out.zero_point = static_cast<int32_t>(qmin);
    scale = (high - low) / static_cast<double>(qmax - qmin);
    reach = static_cast<double>(qmax - qmin);
  }
  const double largest = kLargestGridValue / reach;
  out.scale = static_cast<float>(scale < largest ? scale : largest);
  if (low == high) {
    out.scale = 1.0f;
  } else if (out.scale < kSmallestScale) {
    out.scale = kSmallestScale;
  }
  if (!symmetric) {
    const double zero_point = static_cast<double>(qmin) - rint(low / static_cast<double>(out.scale));
    out.zero_point = static_cast<int32_t>(zero_point < static_cast<double>(qmin)   ? qmin
                                          : zero_point > static_cast<double>(qmax) ? qmax
                                                                                   : static_cast<int64_t>(zero_point));
  }
  return out;
}

}  // namespace rarefy
