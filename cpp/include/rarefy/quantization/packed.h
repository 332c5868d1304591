#pragma once

#include <ATen/core/Tensor.h>
#include <rarefy/export.h>
#include <rarefy/quantization/scheme.h>

#include <cstdint>
#include <map>
#include <optional>
#include <string>
#include <vector>

namespace rarefy::quantization {

/// A tensor as a format stores it.
///
///   data          float8_e4m3fn or float8_e5m2 in the tensor's shape for those two; otherwise uint8 [ceil(elements * bits / 8)]: the
///                 codes of the elements in row-major order as one stream of bits, the lowest bit first (two of 4 bits in a byte: the
///                 first in the low half)
///   scale         in the shape of scheme.scale_shape(shape): float32; uint8 for MX (E8M0: exponent + 127); float8_e4m3fn for
///                 NVFP4; int8 for double-quantized NF4
///   zero_point    int32, for integers that are not symmetric
///   tensor_scale  float32 [1], NVFP4
///   scale_scale   float32 [ceil(scales / scale_block)] and scale_mean float32 [1], double-quantized NF4
///   codebook      float32, codebooks
///
/// Codes: integers q - qmin; minifloats their bits; MX int8 two's complement; NF4 and codebooks the place of the value; binary 1 for
/// positive; ternary the value + 1.
struct QuantizedTensorParts {
  Scheme scheme;
  std::vector<int64_t> shape;
  c10::ScalarType dtype = c10::kFloat;  // of the tensor
  std::map<std::string, at::Tensor> tensors;

  /// Bytes of all parts.
  RAREFY_API int64_t nbytes() const;
};

/// x in a format. dequantize() of the result is simulate() of x, bit for bit.
///   scale, zero_point: of a scheme that observes its range (for a codebook: the codebook); unset: those of x itself.
/// Throws c10::ValueError for values that are not finite, which most codes cannot hold, and whatever simulate() throws.
RAREFY_API QuantizedTensorParts quantize_to(const at::Tensor& x, const Scheme& scheme,
                                            const std::optional<at::Tensor>& scale = std::nullopt,
                                            const std::optional<at::Tensor>& zero_point = std::nullopt);

/// The codes of the parts, int32 in the tensor's shape. Throws as dequantize().
RAREFY_API at::Tensor stored_codes(const QuantizedTensorParts& parts);

/// The tensor of the parts, in its shape and dtype. Throws c10::ValueError for parts that are missing or of another size.
RAREFY_API at::Tensor dequantize(const QuantizedTensorParts& parts);

}  // namespace rarefy::quantization
