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
// x_hat is not differentiated through scale and zero_point: rarefy/ops/fake_quantize_learned.h does that for the scale.
// A wrong shape, range or value throws c10::ValueError, a wrong dtype c10::TypeError, a wrong axis c10::IndexError.
// On CUDA the values of scale, zero_point and of an observer's state are not read back: only their shapes are checked.
namespace rarefy::ops {

/// x_hat, with the clipped straight-through gradient: grad where the value was not clamped, 0 where it was
/// (Jacob et al., 2018, arXiv:1712.05877). Saves one bit per element for the backward pass. NaN gives NaN and gradient 0;
/// infinities are clamped. The gradient is linear in the upstream gradient: its second derivative in x is 0.
RAREFY_API at::Tensor fake_quantize(const at::Tensor& x, const at::Tensor& scale, const at::Tensor& zero_point,
                                    std::optional<int64_t> axis, int64_t qmin, int64_t qmax);

/// x_hat and the packed mask of what was not clamped: bit i % 8 of byte i / 8 for element i in memory order, uint8,
/// padded with 0 to whole 64-bit words. Not differentiable.
RAREFY_API std::tuple<at::Tensor, at::Tensor> fake_quantize_mask(const at::Tensor& x, const at::Tensor& scale,
                                                                 const at::Tensor& zero_point,
                                                                 std::optional<int64_t> axis, int64_t qmin,
                                                                 int64_t qmax);

/// The gradient of fake_quantize: grad where the mask's bit is 1, else 0, bit by bit. `strides` are those of the x_hat that
/// came with the mask; the result has them. Differentiable in grad. Throws c10::ValueError for a mask of another size and
/// for strides with gaps or overlaps. torch.ops.rarefy.fake_quantize_backward_(grad, mask) overwrites a dense grad.
RAREFY_API at::Tensor fake_quantize_backward(const at::Tensor& grad, const at::Tensor& mask,
                                             c10::SymIntArrayRef strides);

/// q as int8 (qmin < 0) or uint8 (qmin >= 0), in x's shape and memory format; the range must fit the type. NaN gives qmax.
RAREFY_API at::Tensor quantize(const at::Tensor& x, const at::Tensor& scale, const at::Tensor& zero_point,
                               std::optional<int64_t> axis, int64_t qmin, int64_t qmax);

/// Updates the running range and derives the parameters from it (choose_qparams), in place.
///   min_val, max_val  float32, contiguous, shape as scale; min_val = +inf and max_val = -inf mean "nothing observed yet".
///   scale, zero_point float32 and int32, contiguous; written, never read.
///   skipped           int64, one element: batches that held a NaN or an infinity (a float64 beyond float32's range is one).
///                     Such a batch counts here and leaves the range as it is; where there is no range yet, scale and
///                     zero_point become those of [0, 0] until a finite batch comes. Nothing is thrown for it.
///   averaging_constant  unset: min_val = min(min_val, min(x)), max_val = max(max_val, max(x)).
///                       c in (0, 1]: min_val = (1 - c) * min_val + c * min(x), in double, and max_val likewise; 1 keeps the
///                       latest range only. The first observation is taken whole.
/// Throws c10::ValueError when x is empty, when the state is neither unset nor a finite range, when it requires a gradient;
/// then nothing has changed.
RAREFY_API void observe(const at::Tensor& x, at::Tensor& min_val, at::Tensor& max_val, at::Tensor& scale,
                        at::Tensor& zero_point, at::Tensor& skipped, std::optional<int64_t> axis,
                        std::optional<double> averaging_constant, int64_t qmin, int64_t qmax, bool symmetric);

/// observe, then fake_quantize with the parameters just derived; one operator, differentiable in x.
RAREFY_API at::Tensor observe_fake_quantize(const at::Tensor& x, at::Tensor& min_val, at::Tensor& max_val,
                                            at::Tensor& scale, at::Tensor& zero_point, at::Tensor& skipped,
                                            std::optional<int64_t> axis, std::optional<double> averaging_constant,
                                            int64_t qmin, int64_t qmax, bool symmetric);

/// Scale (float32) and zero point (int32) of the range [min_val, max_val], widened to hold 0; same shape.
///   symmetric:  zero_point = (qmin + qmax + 1) / 2 (0 for signed ranges), scale = max(|min|, |max|) / (qmax - zero_point)
///   otherwise:  scale = (max - min) / (qmax - qmin), zero_point = clamp(qmin - round_half_even(min / scale))
/// The scale is at least 2^-60, so that the product of two is a normal float, and at most what keeps every grid point
/// finite; a range of zero width at 0 gets scale 1. min_val and max_val are floating point, of one shape.
/// Throws c10::ValueError for a range that is not finite or has min > max, and for a symmetric range of two integers.
RAREFY_API std::tuple<at::Tensor, at::Tensor> choose_qparams(const at::Tensor& min_val, const at::Tensor& max_val,
                                                             int64_t qmin, int64_t qmax, bool symmetric);

}  // namespace rarefy::ops
