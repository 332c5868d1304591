#pragma once

#include <ATen/core/Tensor.h>
#include <rarefy/export.h>
#include <rarefy/quantization/scheme.h>

#include <optional>
#include <tuple>

namespace rarefy::quantization {

/// x rounded as a scheme says, in floating point, with its straight-through gradient: the operators of rarefy/ops/fake_quantize.h,
/// formats.h and weight_formats.h behind one call. torch.ops.rarefy.simulate is the same with the scheme as JSON.
///   scale       where the scheme needs a range: its scales, in the shape that scheme.scale_shape gives. For a codebook: the codebook.
///               Not read for dynamic schemes.
///   zero_point  int32, shape of scale; read for integers alone.
///   seed        int64 [2], for stochastic rounding: seed and number of the call. Dynamic schemes find their scales first.
/// Throws what those operators throw.
RAREFY_API at::Tensor simulate(const at::Tensor& x, const at::Tensor& scale, const at::Tensor& zero_point,
                               const Scheme& scheme, const std::optional<at::Tensor>& seed = std::nullopt);

/// The scales (float32) and zero points (int32) that x itself gives, in the shape of scheme.scale_shape(x.sizes()). For MX, NVFP4
/// and NF4 the scales of the blocks, for binary, ternary and codebooks c10::ValueError: those have no scale beside their values.
RAREFY_API std::tuple<at::Tensor, at::Tensor> scheme_qparams(const at::Tensor& x, const Scheme& scheme);

}  // namespace rarefy::quantization
