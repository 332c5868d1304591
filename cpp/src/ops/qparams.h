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
constexpr float kSmallestScale = 8.673617379884035e-19f;  // 2^-60

/// See choose_qparams in rarefy/ops/fake_quantize.h. Computed in double, so that max - min cannot overflow.
RAREFY_HOST_DEVICE inline QParams range_to_qparams(float min_val, float max_val, int64_t qmin, int64_t qmax,
                                                   bool symmetric) {
  const double low = min_val < 0.0f ? min_val : 0.0;
  const double high = max_val > 0.0f ? max_val : 0.0;
  QParams out;
  if (symmetric) {
    out.zero_point = static_cast<int32_t>((qmin + qmax + 1) >> 1);
    const double amax = -low > high ? -low : high;
    out.scale = static_cast<float>(amax / static_cast<double>(qmax - out.zero_point));
  } else {
    out.scale = static_cast<float>((high - low) / static_cast<double>(qmax - qmin));
    out.zero_point = static_cast<int32_t>(qmin);
  }
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
