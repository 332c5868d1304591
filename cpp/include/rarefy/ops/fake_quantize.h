#pragma once

#include <ATen/core/Tensor.h>
#include <rarefy/export.h>

#include <cstdint>
#include <optional>
#include <tuple>

// Quantization onto a uniform integer grid (docs/dev/numerics.md states the convention once, for every path):
//
//   q = clamp(round_half_even(x / scale) + zero_point, qmin, qmax)         x_hat = (q - zero_point) * scale
//
// Every function here is also torch.ops.rarefy.<name> in Python. Common to all:
//   x           floating point (float32, float64, bfloat16, float16), any shape; channels-last is kept. Computed in
//               float32 (float64 for float64).
//   axis        unset: one scale for the tensor, scale and zero_point have one element.
//               set: one scale per index of that axis, scale and zero_point have shape [x.size(axis)].
//   scale       float32 or float64, finite and positive.      zero_point  int32, within [qmin, qmax].
//   qmin, qmax  the integer range, -32768 <= qmin < qmax <= 65535.
// A wrong shape, range or value throws c10::ValueError, a wrong dtype c10::TypeError, a wrong axis c10::IndexError.
// On CUDA the values of scale and zero_point are not read back, so only their shapes are checked there.
namespace rarefy::ops {

/// x_hat, with the clipped straight-through gradient: grad where the value was not clamped, 0 where it was
/// (Jacob et al., 2018, arXiv:1712.05877). Saves one bit per element for the backward pass. NaN gives NaN.
RAREFY_API at::Tensor fake_quantize(const at::Tensor& x, const at::Tensor& scale, const at::Tensor& zero_point,
                                    std::optional<int64_t> axis, int64_t qmin, int64_t qmax);

/// x_hat and the packed mask of what was not clamped: bit i % 8 of byte i / 8 for element i in memory order, uint8,
/// padded to whole 64-bit words.
RAREFY_API std::tuple<at::Tensor, at::Tensor> fake_quantize_mask(const at::Tensor& x, const at::Tensor& scale,
                                                                 const at::Tensor& zero_point,
                                                                 std::optional<int64_t> axis, int64_t qmin,
                                                                 int64_t qmax);

/// The gradient of fake_quantize: grad where the mask's bit is 1, else 0. `strides` are those of the x that made the mask.
RAREFY_API at::Tensor fake_quantize_backward(const at::Tensor& grad, const at::Tensor& mask, c10::SymIntArrayRef strides);

/// q as int8 (qmin < 0) or uint8 (qmin >= 0), in x's shape and memory format; the range must fit the type. NaN gives qmax.
RAREFY_API at::Tensor quantize(const at::Tensor& x, const at::Tensor& scale, const at::Tensor& zero_point,
                               std::optional<int64_t> axis, int64_t qmin, int64_t qmax);

/// Updates the running range and derives the parameters from it, in place.
///   min_val, max_val  float32, shape as scale; min_val = +inf and max_val = -inf mean "nothing observed yet".
///   averaging_constant  unset: min_val = min(min_val, min(x)) and so on. c in (0, 1]: min_val += c * (min(x) - min_val);
///                       1 keeps the latest range only. The first observation is taken whole.
/// Throws c10::ValueError when x is empty or holds a NaN or an infinity; then nothing has changed.
RAREFY_API void observe(const at::Tensor& x, at::Tensor& min_val, at::Tensor& max_val, at::Tensor& scale,
                        at::Tensor& zero_point, std::optional<int64_t> axis, std::optional<double> averaging_constant,
                        int64_t qmin, int64_t qmax, bool symmetric);

/// observe, then fake_quantize with the parameters just derived; one operator, differentiable in x.
RAREFY_API at::Tensor observe_fake_quantize(const at::Tensor& x, at::Tensor& min_val, at::Tensor& max_val,
                                            at::Tensor& scale, at::Tensor& zero_point, std::optional<int64_t> axis,
                                            std::optional<double> averaging_constant, int64_t qmin, int64_t qmax,
                                            bool symmetric);

/// Scale (float32) and zero point (int32) of the range [min_val, max_val], widened to hold 0; same shape.
///   symmetric:  zero_point = (qmin + qmax + 1) / 2 (0 for signed ranges), scale = max(|min|, |max|) / (qmax - zero_point)
///   otherwise:  scale = (max - min) / (qmax - qmin), zero_point = clamp(qmin - round_half_even(min / scale))
/// A range of zero width at 0 gets scale 1. Throws c10::ValueError for a range that is not finite or has min > max.
RAREFY_API std::tuple<at::Tensor, at::Tensor> choose_qparams(const at::Tensor& min_val, const at::Tensor& max_val,
                                                             int64_t qmin, int64_t qmax, bool symmetric);

}  // namespace rarefy::ops
