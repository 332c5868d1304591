#pragma once

#include <ATen/core/Tensor.h>
#include <rarefy/export.h>

#include <cstdint>
#include <optional>

// Formats for weights whose values are chosen from the weights: binary, ternary, codebooks. x, axis and block as in
// rarefy/ops/formats.h; everything here runs on every device, from torch's operators, but kmeans_codebook (CPU).
namespace rarefy::ops {

/// sign(x) * mean |x| of each block, 0 counting as positive (XNOR-Net: Rastegari et al., 2016, arXiv:1603.05279). NaN stays NaN and
/// counts in no mean. clipped: the gradient is 0 where |x| > 1; otherwise it passes. Means are summed in float64.
RAREFY_API at::Tensor fake_quantize_binary(const at::Tensor& x, std::optional<int64_t> axis,
                                           c10::SymIntArrayRef block = {}, bool clipped = true);

/// sign(x) * a where |x| > d, 0 elsewhere; d = threshold * mean |x| and a the mean of |x| over what is above d (TWN: Li et al.,
/// 2016, arXiv:1605.04711). The gradient passes as it is. Throws c10::ValueError unless threshold > 0.
RAREFY_API at::Tensor fake_quantize_ternary(const at::Tensor& x, double threshold = 0.7,
                                            std::optional<int64_t> axis = std::nullopt, c10::SymIntArrayRef block = {});

/// The places of the nearest values in a codebook, uint8, in x's shape; a tie goes to the smaller value, NaN to the largest.
/// codebook: float32, the scales' shape of formats.h and 2 to 256 entries as the last axis ([K] per tensor), in any order.
RAREFY_API at::Tensor codebook_indices(const at::Tensor& x, const at::Tensor& codebook, std::optional<int64_t> axis,
                                       c10::SymIntArrayRef block = {});

/// The nearest values of a codebook. The gradient passes to x as it is; each entry's is the sum of those of its elements
/// (Han et al., 2016, arXiv:1510.00149), so that clustered weights can go on training either way.
RAREFY_API at::Tensor fake_quantize_codebook(const at::Tensor& x, const at::Tensor& codebook,
                                             std::optional<int64_t> axis, c10::SymIntArrayRef block = {});

/// The codebook with the smallest sum of (weighted) squared distances: exactly, by dynamic programming, for blocks of up to 2^22 /
/// entries values, and by Lloyd's algorithm from quantiles, until it stands still or `iterations` are over, for longer ones.
/// Ascending, float32; deterministic. Entries that nobody needs repeat the last one.
///   weights: floating point, x's shape, not negative: importance of each element.
/// Throws c10::ValueError for entries outside of 2..256, an empty or not finite x, weights that are negative or sum to 0.
RAREFY_API at::Tensor kmeans_codebook(const at::Tensor& x, int64_t entries, std::optional<int64_t> axis = std::nullopt,
                                      c10::SymIntArrayRef block = {},
                                      const std::optional<at::Tensor>& weights = std::nullopt,
                                      int64_t iterations = 100);

}  // namespace rarefy::ops
