// From the range of a block to its scale: one formula for every path on the host.
#pragma once

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <limits>

#include "ops/minifloat.h"
#include "ops/qparams.h"

namespace rarefy::ops {

/// How scales follow from ranges.
struct ScaleRule {
  enum class Kind { integer, minifloat, mx, nvfp4, absmax } kind;
  int64_t qmin = 0, qmax = 0;  // integer
  bool symmetric = true;       // integer
  bool power_of_two = false;   // integer, minifloat
  double greatest = 1.0;       // minifloat: the largest number
  int exponent = 0;            // mx: the largest exponent of an element
  float tensor_scale = 1.0f;   // nvfp4

  /// Whether the ends of a range count by the larger of their magnitudes.
  bool needs_largest_alone() const { return kind != Kind::integer || symmetric; }
};

/// 2^clamp(floor(log2(value)) - exponent, -127, 127) of a positive float.
inline float shared_power_of_two(float value, int exponent) {
  const auto bits = std::bit_cast<uint32_t>(value);
  const int wanted = static_cast<int>(bits >> 23) - exponent;
  if (bits >= 0x00800000u && wanted >= 1 && wanted <= 254) {  // both are normal numbers
    return std::bit_cast<float>(static_cast<uint32_t>(wanted) << 23);
  }
  return std::ldexp(1.0f, std::clamp(std::ilogb(value) - exponent, -127, 127));
}

/// The next power of two that is not below.
inline float up_to_power_of_two(float scale) {
  int exponent = 0;
  return std::frexp(scale, &exponent) == 0.5f ? scale : std::ldexp(1.0f, exponent);
}

/// max |x| / greatest in float32, at least the smallest scale, and 1 for nothing but zeros.
inline float scale_of_largest(float largest, double greatest) {
  if (largest == 0.0f) {
    return 1.0f;
  }
  const double scale = std::min(static_cast<double>(largest) / greatest, kLargestGridValue / greatest);
  return std::max(static_cast<float>(scale), kSmallestScale);
}

/// Scale and zero point of a block whose finite values span [low, high]; (inf, -inf) where it has none.
inline QParams apply_rule(const ScaleRule& rule, float low, float high) {
  using Kind = ScaleRule::Kind;
  if (!(low <= high)) {
    low = high = 0.0f;
  }
  const float largest = std::max(-low, high);
  switch (rule.kind) {
    case Kind::integer: {
      auto q = range_to_qparams(low, high, rule.qmin, rule.qmax, rule.symmetric);
      q.scale = rule.power_of_two ? up_to_power_of_two(q.scale) : q.scale;
      return q;
    }
    case Kind::minifloat: {
      const float scale = scale_of_largest(largest, rule.greatest);
      return {rule.power_of_two ? up_to_power_of_two(scale) : scale, 0};
    }
    case Kind::mx: {
      if (largest == 0.0f) {
        return {1.0f, 0};
      }
      return {shared_power_of_two(largest, rule.exponent), 0};
    }
    case Kind::nvfp4: {
      const auto wanted =
          static_cast<float>(static_cast<double>(largest) / (6.0 * static_cast<double>(rule.tensor_scale)));
      return {std::max(round_to_minifloat(wanted, e4m3_shape()), 0x1p-9f), 0};
    }
    case Kind::absmax:
      return {largest == 0.0f ? 1.0f : std::max(largest, kSmallestScale), 0};
  }
  return {1.0f, 0};
}

}  // namespace rarefy::ops
