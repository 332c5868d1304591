#pragma once

#include <ATen/core/Tensor.h>
#include <rarefy/export.h>
#include <rarefy/quantization/packed.h>

#include <optional>
#include <string>
#include <vector>

// Computing with weights that stay as a format stores them (rarefy/quantization/packed.h): codes become numbers a few rows at a
// time, so that no float tensor of the weight's size is made. Also torch.ops.rarefy.dequantize_packed, packed_linear and
// packed_embedding, which take the parts as a list in the order of part_names, and the scheme as JSON.
namespace rarefy::quantization {

/// The names of a format's parts, in the order in which operators take them.
RAREFY_API std::vector<std::string> part_names(const Scheme& scheme);

/// The parts of a list in that order. Throws c10::ValueError for a list of another length.
RAREFY_API QuantizedTensorParts parts_of(const std::vector<at::Tensor>& tensors, const Scheme& scheme,
                                         std::vector<int64_t> shape, at::ScalarType dtype);

/// Throws c10::ValueError, which begins with `function`, for parts that are missing, or of another size or type than the scheme
/// and the shape say.
RAREFY_API void check_parts(const char* function, const QuantizedTensorParts& parts);

/// dequantize(parts), bit for bit, on all threads.
RAREFY_API at::Tensor dequantize_packed(const QuantizedTensorParts& parts);

/// x W^T + bias for a packed weight W [out, in]: x [..., in] to [..., out]. Weights become the numbers that simulate() gives, bit for
/// bit; on the CPU in blocks of rows, which for up to 8 rows of x stay in the caches. Differentiable with respect to x and bias. Other
/// devices make the whole weight first.
/// Throws c10::ValueError for a weight that has not two dimensions and another number of features, c10::TypeError unless x has
/// the weight's type.
RAREFY_API at::Tensor packed_linear(const at::Tensor& x, const QuantizedTensorParts& weight,
                                    const std::optional<at::Tensor>& bias = std::nullopt);

/// Rows of a packed table [rows, columns]: indices of any shape to [..., columns]. Only those rows are unpacked, on the CPU.
/// Throws c10::IndexError for an index outside of [0, rows), c10::TypeError unless indices are int32 or int64.
RAREFY_API at::Tensor packed_embedding(const at::Tensor& indices, const QuantizedTensorParts& table);

}  // namespace rarefy::quantization
