// The parameters of a grid as the CPU kernels of the fake-quantize family want them, their values checked.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/Exception.h>

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <utility>
#include <vector>

#include "ops/cpu/dense.h"

namespace rarefy::ops {

/// scale and zero_point as plain arrays, their values checked. T is the type that is computed in.
template <typename T>
struct QuantizationGrid {
  std::vector<T> scale;
  std::vector<T> zero_point;
  T qmin;
  T qmax;

  QuantizationGrid(const char* function, const at::Tensor& scales, const at::Tensor& zero_points, int64_t low,
                   int64_t high)
      : qmin(static_cast<T>(low)), qmax(static_cast<T>(high)) {
    const auto s = scales.contiguous();
    const auto z = zero_points.contiguous();
    const auto* zeros = z.const_data_ptr<int32_t>();
    const auto fill = [&](const auto* values) {
      for (int64_t i = 0; i < s.numel(); ++i) {
        const T value = static_cast<T>(values[i]);
        TORCH_CHECK_VALUE(std::isfinite(value) && value > 0, "[", function, "] scale must be finite and positive, got ",
                          values[i], " at index ", i);
        TORCH_CHECK_VALUE(zeros[i] >= low && zeros[i] <= high, "[", function, "] zero_point must be within [", low,
                          ", ", high, "], got ", zeros[i], " at index ", i);
        scale.push_back(value);
        zero_point.push_back(static_cast<T>(zeros[i]));
      }
    };
    scale.reserve(static_cast<size_t>(s.numel()));
    zero_point.reserve(static_cast<size_t>(s.numel()));
    s.scalar_type() == at::kDouble ? fill(s.const_data_ptr<double>()) : fill(s.const_data_ptr<float>());
  }

  /// clamp(round(x / scale) + zero_point) of one value and its value before clamping, NaN as NaN.
  std::pair<T, T> index(T x, size_t channel) const {
    const T q = std::nearbyint(x / scale[channel]) + zero_point[channel];
    return {q < qmin ? qmin : q > qmax ? qmax : q, q};
  }
};

/// The grid for the vector kernels, its parameters repeated as spread() wants them.
class VectorGrid {
 public:
  VectorGrid(const char* function, const at::Tensor& x, int64_t axis, const at::Tensor& scale,
             const at::Tensor& zero_point, int64_t qmin, int64_t qmax)
      : grid_(function, scale, zero_point, qmin, qmax), layout_(layout_of(x, axis)) {
    const auto wide = spread(layout_, x.numel());
    if (wide.channels != layout_.channels) {
      grid_.scale = repeat(grid_.scale, wide.channels);
      grid_.zero_point = repeat(grid_.zero_point, wide.channels);
      layout_ = wide;
    }
  }

  cpu::Layout layout() const { return layout_; }
  cpu::Grid view() const { return {grid_.scale.data(), grid_.zero_point.data(), grid_.qmin, grid_.qmax}; }

 private:
  std::vector<float> repeat(const std::vector<float>& values, int64_t count) const {
    std::vector<float> out;
    out.reserve(static_cast<size_t>(count));
    while (out.size() < static_cast<size_t>(count)) {
      for (const float value : values) {
        out.insert(out.end(), static_cast<size_t>(layout_.inner), value);
      }
    }
    return out;
  }

  QuantizationGrid<float> grid_;
  cpu::Layout layout_;
};

}  // namespace rarefy::ops
