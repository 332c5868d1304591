#pragma once

#include <ATen/core/Tensor.h>
#include <rarefy/export.h>

#include <cstdint>
#include <optional>
#include <string_view>
#include <tuple>

// Rounding to formats beside one integer grid per tensor or channel: scales per group, block and token, minifloats, MX, NVFP4,
// NF4. Every function is also torch.ops.rarefy.<name>. rarefy/quantization/scheme.h describes them as values.
//
// Common to all:
//   x      floating point (float32, float64, bfloat16, float16), any shape; memory format is kept. Computed in float32 (float64
//          for float64), the result rounded once to x's type. NaN stays NaN; infinities become the end of the range.
//   axis, block   what shares a scale:
//     unset, {}       the tensor                                          scales of shape [1]
//     a, {}           each index of axis a                                [x.size(a)]
//     a, {n}          n neighbours along axis a, the last group shorter   x's shape with ceil(size / n) at a
//     -1, {r, c}      blocks of r rows and c columns                      x's shape with ceil(R / r), ceil(C / c) at the end
//     -1, {-1}        each row along the last axis (token)                x's shape with 1 at the end
//   scale  float32 or float64, finite and positive. Division by it is correctly rounded.
//   A wrong shape, range or value throws c10::ValueError, a wrong dtype c10::TypeError, a wrong axis c10::IndexError; so does
//   an axis of blocks of size 0.
//   Where the scale comes from x itself, only its finite values count, and the gradient of x passes as it is: nothing that they
//   span is clamped by more than a step. A scale is at least 2^-60, and 1 where all values are 0.
//   CUDA: the same formulas from torch's operators (formats_anywhere.cpp).
namespace rarefy::ops {

// --- With given scales -----------------------------------------------------------------------------------------------------

/// fake_quantize (rarefy/ops/fake_quantize.h) with scales and zero points (int32) per group, block or token.
///   clipped: the gradient is 0 where the value was clamped (and at NaN); otherwise it passes everywhere.
///   seed: int64 [2], the seed and the number of the call: rounds stochastically, floor(x / scale + u), with u in [0, 1) from
///   Philox4x32-10 at the element's position (in the order of its contiguous tensor, the axis of groups last).
RAREFY_API at::Tensor fake_quantize_group(const at::Tensor& x, const at::Tensor& scale, const at::Tensor& zero_point,
                                          std::optional<int64_t> axis, c10::SymIntArrayRef block, int64_t qmin,
                                          int64_t qmax, bool clipped = true,
                                          const std::optional<at::Tensor>& seed = std::nullopt);

/// x / scale rounded to the nearest number of a minifloat, ties to even, times scale.
///   exponent_bits 1 to 7, mantissa_bits 0 to 6, both 7 at most; value = 2^(exponent - bias) * 1.mantissa, with denormals.
///   specials "none": every code is finite (FP6, FP4); "nan": the largest code is NaN (E4M3FN); "ieee": the largest exponent
///   is infinity and NaN (E5M2).
///   saturate: what rounds beyond the largest number becomes it, infinities too; otherwise infinity or NaN.
///   The sign of 0 is kept. With mantissa_bits = 0 a tie goes away from 0.
RAREFY_API at::Tensor cast_minifloat(const at::Tensor& x, const at::Tensor& scale, std::optional<int64_t> axis,
                                     c10::SymIntArrayRef block, int64_t exponent_bits, int64_t mantissa_bits,
                                     int64_t bias, c10::string_view specials, bool saturate = true, bool clipped = true,
                                     const std::optional<at::Tensor>& seed = std::nullopt);

/// The clipped gradients: grad where the value was not clamped, 0 elsewhere. Linear in grad.
RAREFY_API at::Tensor fake_quantize_group_backward(const at::Tensor& grad, const at::Tensor& x, const at::Tensor& scale,
                                                   const at::Tensor& zero_point, std::optional<int64_t> axis,
                                                   c10::SymIntArrayRef block, int64_t qmin, int64_t qmax);
RAREFY_API at::Tensor cast_minifloat_backward(const at::Tensor& grad, const at::Tensor& x, const at::Tensor& scale,
                                              std::optional<int64_t> axis, c10::SymIntArrayRef block,
                                              int64_t exponent_bits, int64_t mantissa_bits, int64_t bias,
                                              c10::string_view specials);

// --- With scales from x, read once and written once ------------------------------------------------------------------------

/// The scales of x: choose_qparams of each block's range, and with power_of_two (symmetric alone) the next power of two.
RAREFY_API std::tuple<at::Tensor, at::Tensor> group_qparams(const at::Tensor& x, std::optional<int64_t> axis,
                                                            c10::SymIntArrayRef block, int64_t qmin, int64_t qmax,
                                                            bool symmetric, bool power_of_two = false);
/// fake_quantize_group with them.
RAREFY_API at::Tensor fake_quantize_dynamic(const at::Tensor& x, std::optional<int64_t> axis, c10::SymIntArrayRef block,
                                            int64_t qmin, int64_t qmax, bool symmetric, bool power_of_two = false);

/// max |x| / largest number of each block, and with power_of_two the next power of two.
RAREFY_API at::Tensor minifloat_scale(const at::Tensor& x, std::optional<int64_t> axis, c10::SymIntArrayRef block,
                                      int64_t exponent_bits, int64_t mantissa_bits, int64_t bias,
                                      c10::string_view specials, bool power_of_two = false);
/// cast_minifloat with them.
RAREFY_API at::Tensor cast_minifloat_dynamic(const at::Tensor& x, std::optional<int64_t> axis,
                                             c10::SymIntArrayRef block, int64_t exponent_bits, int64_t mantissa_bits,
                                             int64_t bias, c10::string_view specials, bool power_of_two = false);

/// OCP MX v1.0 along an axis: 2^clamp(floor(log2(max |x|)) - n, -127, 127) of each block, n the largest exponent of the element
/// type ("e4m3", "e5m2", "e3m2", "e2m3", "e2m1", "int8"); elements saturate.
RAREFY_API at::Tensor mx_scale(const at::Tensor& x, c10::string_view element, int64_t block = 32, int64_t axis = -1);
RAREFY_API at::Tensor fake_quantize_mx(const at::Tensor& x, c10::string_view element, int64_t block = 32,
                                       int64_t axis = -1);

/// max |x| / (6 * 448), [1]: the tensor's scale, with which the largest block's is 448.
RAREFY_API at::Tensor nvfp4_tensor_scale(const at::Tensor& x);
/// The scale of each block in e4m3 (as float32): max |x| / (6 * tensor_scale), at least 2^-9.
RAREFY_API at::Tensor nvfp4_scale(const at::Tensor& x, const at::Tensor& tensor_scale, int64_t block = 16,
                                  int64_t axis = -1);
/// e2m1 with float32(block scale * tensor scale); tensor_scale unset: nvfp4_tensor_scale(x).
RAREFY_API at::Tensor fake_quantize_nvfp4(const at::Tensor& x,
                                          const std::optional<at::Tensor>& tensor_scale = std::nullopt,
                                          int64_t block = 16, int64_t axis = -1);

/// max |x| of each block. scale_block > 0: as they come back from 8 bits (in the order of the scales, their mean subtracted,
/// blocks of scale_block to round_half_even(127 d / max |d|)).
RAREFY_API at::Tensor nf4_scale(const at::Tensor& x, int64_t block = 64, int64_t scale_block = 0, int64_t axis = -1);
/// The nearest of the 16 values of NormalFloat (a tie goes down) times the scale.
RAREFY_API at::Tensor fake_quantize_nf4(const at::Tensor& x, int64_t block = 64, int64_t scale_block = 0,
                                        int64_t axis = -1);

/// The smallest and largest finite value of each block, float32; (inf, -inf) where there is none.
RAREFY_API std::tuple<at::Tensor, at::Tensor> block_range(const at::Tensor& x, std::optional<int64_t> axis,
                                                          c10::SymIntArrayRef block);

}  // namespace rarefy::ops
