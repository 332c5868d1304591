#pragma once

#include <ATen/core/Tensor.h>
#include <rarefy/export.h>
#include <rarefy/quantization/packed.h>

#include <cstdint>
#include <string>
#include <utility>
#include <variant>
#include <vector>

namespace rarefy {

/// How an ONNX file holds a quantized weight: tensors, and the operators that make the weight of them.
struct OnnxWeightForm {
  struct Tensor {
    std::string name;
    at::Tensor values;
    /// Of int8 or uint8 values that are stored in half a byte each, INT4 or UINT4.
    bool is_int4 = false;
  };
  struct Node {
    std::string op;
    std::vector<std::string> inputs;  // names of tensors, or of results of nodes before it
    std::string output;
    std::vector<std::pair<std::string, std::variant<int64_t, std::vector<int64_t>>>> attributes;
    c10::ScalarType dtype = c10::kFloat;  // of the result
    std::vector<int64_t> shape;           // of the result
  };
  std::vector<Tensor> tensors;
  std::vector<Node> nodes;  // the last one's result is the weight, float32
};

struct OnnxWeightOptions {
  int64_t opset = 21;
  /// The last two axes are exchanged: [in, out] of a weight that is stored as [out, in].
  bool transposed = false;
  /// Write zero points that are all 0.
  bool zero_points = true;
};

/// A stored weight in operators of ONNX's standard set, equal to dequantize(parts) bit for bit:
///
///   integers, binary, ternary      DequantizeLinear of INT4 or UINT4 (from operator set 21 on), INT8, UINT8, INT16 or UINT16, with one
///   MX int8                        scale, scales along an axis, or in blocks along one (blocks of two axes: scales repeated along
///                                  the other)
///   FP8 E4M3, E5M2, MX of them     the same of FLOAT8E4M3FN or FLOAT8E5M2
///   other minifloats and MX, NVFP4, NF4     Gather from the table of the format's numbers by codes of 4 or 8 bits, times the scales
///   codebooks                      Gather from the codebooks
///
/// NVFP4's scales are FLOAT8E4M3FN behind a DequantizeLinear with the tensor's scale, those of double-quantized NF4 INT8 behind one
/// with the scales' scales; MX's are float32 powers of two, as ONNX Runtime computes with no FLOAT8E8M0.
///
/// Throws c10::ValueError for a weight that is not float32, and where the operator set cannot say it: 19 is needed for FP8, 21 for
/// blocks and 9 to 16 bits.
RAREFY_API OnnxWeightForm onnx_weight_form(const quantization::QuantizedTensorParts& parts,
                                           const OnnxWeightOptions& options = {});

}  // namespace rarefy
