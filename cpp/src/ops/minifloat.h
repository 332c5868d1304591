// Minifloats on scalars: rounding, codes, and the constants of the vector loops. One formula for every plain path.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/Exception.h>

#include <cmath>
#include <cstdint>
#include <limits>
#include <string>
#include <vector>

#include "ops/cpu/formats_simd.h"

namespace rarefy::ops {

/// A minifloat of at most 8 bits with its sign; see rarefy/quantization/format.h, whose rules it has.
struct MinifloatShape {
  int64_t exponent_bits, mantissa_bits, bias;
  enum class Specials { none, nan, ieee } specials;
  bool saturate;

  int greatest_exponent() const {
    const bool special = specials == Specials::ieee || (specials == Specials::nan && mantissa_bits == 0);
    return static_cast<int>((int64_t{1} << exponent_bits) - 1 - (special ? 1 : 0) - bias);
  }
  int smallest_exponent() const { return static_cast<int>(1 - bias); }
  double greatest() const {
    const double steps = std::ldexp(1.0, static_cast<int>(mantissa_bits));
    const double last = specials == Specials::nan && mantissa_bits > 0 ? steps - 2.0 : steps - 1.0;
    return std::ldexp(1.0 + last / steps, greatest_exponent());
  }
  /// What a magnitude above the greatest number becomes.
  double overflow() const {
    return saturate                     ? greatest()
           : specials == Specials::ieee ? std::numeric_limits<double>::infinity()
                                        : std::numeric_limits<double>::quiet_NaN();
  }
  /// The largest magnitude that rounds to a number: below half a step above the greatest one, or that itself where the tie
  /// goes down to an even mantissa.
  template <typename T>
  T last_inside() const {
    const double step = std::ldexp(1.0, greatest_exponent() - static_cast<int>(mantissa_bits));
    const auto edge = static_cast<T>(greatest() + step / 2);
    const bool is_even = std::fmod(greatest() / step, 2.0) == 0.0;
    return is_even ? edge : std::nextafter(edge, T(0));
  }
  cpu::Element element() const {
    const auto power = [](int exponent) { return static_cast<float>(std::ldexp(1.0, exponent)); };
    return {power(23 - static_cast<int>(mantissa_bits)), power(smallest_exponent()), power(greatest_exponent() + 1),
            static_cast<float>(greatest()), static_cast<float>(overflow())};
  }
};

/// Throws c10::ValueError for what is no minifloat.
inline MinifloatShape minifloat_shape(const char* function, int64_t exponent_bits, int64_t mantissa_bits, int64_t bias,
                                      c10::string_view specials, bool saturate) {
  using Specials = MinifloatShape::Specials;
  TORCH_CHECK_VALUE(exponent_bits >= 1 && exponent_bits <= 7 && mantissa_bits >= 0 && mantissa_bits <= 6 &&
                        exponent_bits + mantissa_bits <= 7,
                    "[", function,
                    "] a minifloat must have 1 to 7 exponent bits, 0 to 6 mantissa bits and 7 of both, got ",
                    exponent_bits, " and ", mantissa_bits);
  TORCH_CHECK_VALUE(specials == "none" || specials == "nan" || specials == "ieee", "[", function,
                    "] specials must be none, nan or ieee, got '", specials, "'");
  const auto kind = specials == "none" ? Specials::none : specials == "nan" ? Specials::nan : Specials::ieee;
  TORCH_CHECK_VALUE(kind != Specials::none || saturate, "[", function,
                    "] a minifloat without NaN and infinity must saturate, got saturate false");
  const MinifloatShape shape{exponent_bits, mantissa_bits, bias, kind, saturate};
  TORCH_CHECK_VALUE(shape.greatest_exponent() >= shape.smallest_exponent(), "[", function,
                    "] a minifloat must have an exponent for numbers beside NaN and infinity, got ", exponent_bits,
                    " exponent bits");
  TORCH_CHECK_VALUE(shape.greatest_exponent() <= 100 && shape.smallest_exponent() - mantissa_bits >= -120, "[",
                    function, "] the bias must keep a minifloat's numbers within 2^-120 and 2^101, got ", bias);
  return shape;
}

/// The elements of an MX format by name; int8 is a minifloat of one exponent. Throws c10::ValueError for another name.
inline MinifloatShape mx_shape(const char* function, c10::string_view element) {
  using Specials = MinifloatShape::Specials;
  if (element == "e4m3") {
    return {4, 3, 7, Specials::nan, true};
  }
  if (element == "e5m2") {
    return {5, 2, 15, Specials::ieee, true};
  }
  if (element == "e3m2") {
    return {3, 2, 3, Specials::none, true};
  }
  if (element == "e2m3") {
    return {2, 3, 1, Specials::none, true};
  }
  if (element == "e2m1") {
    return {2, 1, 1, Specials::none, true};
  }
  TORCH_CHECK_VALUE(element == "int8", "[", function, "] element must be e4m3, e5m2, e3m2, e2m3, e2m1 or int8, got '",
                    element, "'");
  return {1, 6, 1, Specials::none, true};
}

inline MinifloatShape e2m1_shape() { return {2, 1, 1, MinifloatShape::Specials::none, true}; }
inline MinifloatShape e4m3_shape() { return {4, 3, 7, MinifloatShape::Specials::nan, true}; }

/// The distance between neighbours around a finite magnitude.
template <typename T>
T minifloat_step(T magnitude, const MinifloatShape& f) {
  int exponent = f.smallest_exponent();
  if (magnitude > T(0)) {
    exponent = std::max(exponent, std::ilogb(magnitude));
  }
  return std::ldexp(T(1), exponent - static_cast<int>(f.mantissa_bits));
}

/// y rounded to the nearest number (ties to even), or, with u in [0, 1), up with the probability 1 - P(u < fraction).
template <typename T>
T round_to_minifloat(T y, const MinifloatShape& f, const T* u = nullptr) {
  if (std::isnan(y)) {
    return y;
  }
  const T cap = std::ldexp(T(1), f.greatest_exponent() + 1);
  const T magnitude = std::min(std::abs(y), cap);
  const T step = minifloat_step(magnitude, f);
  const T rounded = (u == nullptr ? std::nearbyint(magnitude / step) : std::floor(magnitude / step + *u)) * step;
  return std::copysign(rounded > static_cast<T>(f.greatest()) ? static_cast<T>(f.overflow()) : rounded, y);
}

/// The bits of a number of the format.
inline uint8_t minifloat_code(double value, const MinifloatShape& f) {
  const auto sign = static_cast<uint32_t>(std::signbit(value)) << (f.exponent_bits + f.mantissa_bits);
  const double magnitude = std::abs(value);
  if (magnitude < std::ldexp(1.0, f.smallest_exponent())) {
    return static_cast<uint8_t>(
        sign | static_cast<uint32_t>(std::ldexp(magnitude, static_cast<int>(f.mantissa_bits) - f.smallest_exponent())));
  }
  const int exponent = std::ilogb(magnitude);
  const double steps = std::ldexp(magnitude, static_cast<int>(f.mantissa_bits) - exponent);
  const auto mantissa = static_cast<uint32_t>(steps) - (1u << f.mantissa_bits);
  return static_cast<uint8_t>(sign | static_cast<uint32_t>(exponent + f.bias) << f.mantissa_bits | mantissa);
}

/// The numbers of all codes, NaN and infinities included.
inline std::vector<float> minifloat_values(const MinifloatShape& f) {
  using Specials = MinifloatShape::Specials;
  const auto half = 1u << (f.exponent_bits + f.mantissa_bits);
  std::vector<float> values;
  for (uint32_t code = 0; code < 2 * half; ++code) {
    const uint32_t mantissa = code & ((1u << f.mantissa_bits) - 1u);
    const auto exponent = static_cast<int>((code & (half - 1u)) >> f.mantissa_bits);
    const auto steps = static_cast<double>(mantissa + (exponent > 0 ? 1u << f.mantissa_bits : 0u));
    double value = std::ldexp(steps, std::max(exponent, 1) - static_cast<int>(f.bias + f.mantissa_bits));
    const bool top = exponent == (1 << f.exponent_bits) - 1;
    if (f.specials == Specials::nan && (code & (half - 1u)) == half - 1u) {
      value = std::numeric_limits<double>::quiet_NaN();
    } else if (f.specials == Specials::ieee && top) {
      value = mantissa == 0 ? std::numeric_limits<double>::infinity() : std::numeric_limits<double>::quiet_NaN();
    }
    values.push_back(static_cast<float>(code >= half ? -value : value));
  }
  return values;
}

}  // namespace rarefy::ops
