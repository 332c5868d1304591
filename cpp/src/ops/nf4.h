// The sixteen values of 4-bit NormalFloat (Dettmers et al., 2023, arXiv:2305.14314, appendix E), for a largest magnitude of 1.
#pragma once

#include <array>
#include <cstddef>

namespace rarefy::ops {

constexpr std::array<float, 16> kNormalFloat = {
    -1.0f,
    -0.6961928009986877f,
    -0.5250730514526367f,
    -0.39491748809814453f,
    -0.28444138169288635f,
    -0.18477343022823334f,
    -0.09105003625154495f,
    0.0f,
    0.07958029955625534f,
    0.16093020141124725f,
    0.24611230194568634f,
    0.33791524171829224f,
    0.44070982933044434f,
    0.5626170039176941f,
    0.7229568362236023f,
    1.0f,
};

/// The middle between each value and the next, rounded to float32: up to it, and with it, the lower value is the nearest.
constexpr std::array<float, 15> normal_float_bounds() {
  std::array<float, 15> bounds{};
  for (size_t k = 0; k < bounds.size(); ++k) {
    bounds[k] =
        static_cast<float>((static_cast<double>(kNormalFloat[k]) + static_cast<double>(kNormalFloat[k + 1])) / 2);
  }
  return bounds;
}

constexpr std::array<float, 15> kNormalFloatBounds = normal_float_bounds();

/// The code of x / scale.
template <typename T>
size_t normal_float_code(T y) {
  size_t code = 0;
  while (code < kNormalFloatBounds.size() && y > static_cast<T>(kNormalFloatBounds[code])) {
    ++code;
  }
  return code;
}

}  // namespace rarefy::ops
