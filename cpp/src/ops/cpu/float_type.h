// The element types of the vector loops (x_simd.cpp). No torch and no standard library here.
#pragma once

namespace rarefy::cpu {

enum class FloatType { f32, bf16, f16 };

}  // namespace rarefy::cpu

/// Returns the last arguments, evaluated with T as the element type, from the calling function. For x_simd.cpp files.
#define RAREFY_FOR_FLOAT_TYPE(type, T, ...) \
  switch (type) {                           \
    case FloatType::f32: {                  \
      using T = float;                      \
      return __VA_ARGS__;                   \
    }                                       \
    case FloatType::bf16: {                 \
      using T = Bf16;                       \
      return __VA_ARGS__;                   \
    }                                       \
    default: {                              \
      using T = Half;                       \
      return __VA_ARGS__;                   \
    }                                       \
  }
