// Elementary functions of a Vec (simd.h), for files that cmake/RarefyIsa.cmake compiles. No fused multiply-add: every
// instruction set gives the same bits.
#pragma once

#include "ops/cpu/simd.h"

namespace rarefy::cpu::RAREFY_ISA {

/// 2^x for -126 <= x <= 0, within 1.5 ulp; exactly 1 at 0, NaN for NaN.
///
/// x = n + k / 8 + f with k in 0..7 and |f| <= 1/16, and 2^x = 2^n 2^(k/8) 2^f. Adding 1.5 * 2^20 + 127 rounds to a multiple
/// of 1/8 and leaves n + 127 and k in the low bits of the sum. The polynomial for (2^f - 1) / f is the minimax one of the
/// relative error of 2^f: 2.7e-8.
inline Vec exp2_bounded(Vec x) {
  const Vec shifter(1572991.0f);  // 1.5 * 2^20 + 127
  const Vec shifted = x + shifter;
  const Vec f = x - (shifted - shifter);
  const Vec p = ((Vec(5.549621955e-2f) * f + Vec(2.402576357e-1f)) * f + Vec(6.931472421e-1f)) * f;
  const Vec scale = exp2_eighths(shifted);
  return scale * p + scale;
}

/// 2^x for x <= 0: as exp2_bounded, and 0 where x < -126 (the result would be below the smallest normal float).
inline Vec exp2_nonpositive(Vec x) {
  const Vec lowest(-126.0f);
  return zero_below(x, lowest, exp2_bounded(max(lowest, x)));  // max keeps NaN
}

/// The natural logarithm of max(x, 2^-126), within 1 ulp; exactly 0 at 1, NaN for NaN and infinity.
///
/// x = m 2^e with m in [sqrt(1/2), sqrt(2)), f = m - 1 exactly, and log x = e log 2 + f - f^2 / 2 + f^3 g(f), where g is the
/// minimax polynomial of the relative error of log(1 + f): 7.5e-10. log 2 is 0.693359375 - 2.1219444e-4; e times the first
/// is exact.
inline Vec log_positive(Vec x) {
  Vec e;
  const Vec f = split_exponent(max(Vec(1.17549435e-38f), x), &e) - Vec(1.0f);
  Vec g = Vec(6.746633947e-2f);
  g = g * f + Vec(-1.167564552e-1f);
  g = g * f + Vec(1.188816173e-1f);
  g = g * f + Vec(-1.240558993e-1f);
  g = g * f + Vec(1.421955258e-1f);
  g = g * f + Vec(-1.666799581e-1f);
  g = g * f + Vec(2.000211865e-1f);
  g = g * f + Vec(-2.500000960e-1f);
  g = g * f + Vec(3.333331260e-1f);
  const Vec square = f * f;
  const Vec rest = (square * f) * g - Vec(0.5f) * square - e * Vec(2.12194440e-4f);
  return e * Vec(0.693359375f) + (f + (rest + (x - x)));
}

}  // namespace rarefy::cpu::RAREFY_ISA
