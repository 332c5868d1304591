#pragma once

#include <ATen/core/Tensor.h>
#include <rarefy/export.h>

#include <cstdint>
#include <optional>
#include <tuple>

// Sums of products of integers in accumulators of few bits. Every function is also torch.ops.rarefy.<name>.
namespace rarefy::ops {

/// The largest sum of |integer weights| of a channel with which no sum of products leaves an accumulator of that many bits
/// (signed), whatever the inputs of input_bits bits are: (2^(accumulator_bits - 1) - 1) * 2^(signed - input_bits), signed being
/// 1 for signed inputs and 0 otherwise (A2Q: Colbert et al., 2023, arXiv:2308.13504).
/// Throws c10::ValueError unless accumulator_bits is in 2..64 and input_bits in 1..16.
RAREFY_API double a2q_limit(int64_t accumulator_bits, int64_t input_bits, bool input_signed);

/// x on the grid of integers q in [qmin, qmax] with scale, zero point 0, and the sum of |q| of every channel within a2q_limit:
///
///   y = x / scale * min(1, (1 - 2^-20) * limit / sum |x / scale|)      q = clamp(trunc(y), qmin, qmax)      q * scale
///
/// Rounding goes towards 0, so that no sum grows by it; the 2^-20 outweighs the rounding of y. The gradient is that of
/// y * scale, its dependence on the sum included, where q was not clamped.
///   axis: the channels' (unset: the whole tensor is one); scale: as in rarefy/ops/fake_quantize.h.
RAREFY_API at::Tensor fake_quantize_a2q(const at::Tensor& x, const at::Tensor& scale, std::optional<int64_t> axis,
                                        int64_t qmin, int64_t qmax, int64_t accumulator_bits, int64_t input_bits,
                                        bool input_signed);

/// The smallest and the greatest number that a sum of products of a channel's integer weights with inputs in [low, high] can
/// meet, in any order of additions, int64 [channels]. weight is of an integer type; axis as above.
/// Throws c10::ValueError for low > high.
RAREFY_API std::tuple<at::Tensor, at::Tensor> accumulator_range(const at::Tensor& weight, std::optional<int64_t> axis,
                                                                int64_t low, int64_t high);

/// Proves that no such sum leaves a signed accumulator of `bits` bits. Throws c10::ValueError that names the first channel whose
/// range does not fit.
RAREFY_API void check_accumulator(const at::Tensor& weight, std::optional<int64_t> axis, int64_t low, int64_t high,
                                  int64_t bits);

}  // namespace rarefy::ops
