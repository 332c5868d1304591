#include <ATen/ops/arange.h>
#include <ATen/ops/constant_pad_nd.h>
#include <ATen/ops/frexp.h>
#include <ATen/ops/full.h>
#include <ATen/ops/tensor.h>
#include <ATen/ops/zeros.h>
#include <c10/util/Exception.h>
#include <rarefy/onnx/weight_form.h>

#include <algorithm>
#include <numeric>
#include <optional>

#include "ops/block_views.h"
#include "ops/minifloat.h"
#include "ops/nf4.h"
#include "ops/qparams.h"

namespace rarefy {
namespace {

using namespace quantization;
using Sizes = std::vector<int64_t>;

constexpr int64_t kFloat8Opset = 19, kBlockOpset = 21;

/// How many neighbours along each axis share a scale.
Sizes blocks_of(const Scheme& scheme, const Sizes& shape) {
  auto blocks = shape;  // one scale for all
  const auto dims = static_cast<int64_t>(shape.size());
  const auto along = scheme.block_axis();
  if (!along.has_value()) {
    return blocks;
  }
  const auto at = static_cast<size_t>(*along < 0 ? *along + dims : *along);
  const auto sizes = scheme.block();
  if (sizes.empty()) {
    blocks[at] = 1;
    return blocks;
  }
  std::fill(blocks.begin(), blocks.end(), 1);
  blocks[at] = sizes.back() < 0 ? shape[at] : std::min(sizes.back(), shape[at]);
  if (sizes.size() == 2) {
    blocks[at - 1] = std::min(sizes.front(), shape[at - 1]);
  }
  return blocks;
}

class Writer {
 public:
  Writer(const QuantizedTensorParts& parts, const OnnxWeightOptions& options)
      : parts_(parts), options_(options), shape_(parts.shape), blocks_(blocks_of(parts.scheme, parts.shape)) {
    scale_shape_.resize(shape_.size());
    for (size_t i = 0; i < shape_.size(); ++i) {
      scale_shape_[i] = blocks_[i] == 0 ? 0 : (shape_[i] + blocks_[i] - 1) / blocks_[i];
    }
    codes_ = stored_codes(parts);
    if (options.transposed) {
      codes_ = codes_.transpose(-2, -1).contiguous();
      for (auto* sizes : {&shape_, &blocks_, &scale_shape_}) {
        std::swap(*(sizes->end() - 1), *(sizes->end() - 2));
      }
    }
  }

  OnnxWeightForm operator()(const Integer&) {
    const auto& scheme = parts_.scheme;
    const auto zero_point = scheme.symmetric ? at::full({}, (scheme.qmin() + scheme.qmax() + 1) >> 1, at::kInt)
                                             : of_scales(part("zero_point"));
    dequantize(codes_ + scheme.qmin(), scheme.bits, scheme.qmin() < 0, of_scales(part("scale")), zero_point);
    return std::move(form_);
  }
  OnnxWeightForm operator()(const Binary&) { return signs(codes_ * 2 - 1); }
  OnnxWeightForm operator()(const Ternary&) { return signs(codes_ - 1); }
  OnnxWeightForm operator()(const Minifloat& f) {
    auto saturated = f;
    saturated.saturate = true;
    const bool is_e4m3 = saturated == Minifloat::e4m3();
    if (is_e4m3 || saturated == Minifloat::e5m2()) {
      return float8(is_e4m3, of_scales(part("scale")));
    }
    return table(numbers_of(f), scales("weight_scale", of_scales(part("scale"))));
  }
  OnnxWeightForm operator()(const MX& f) {
    const auto scale = of_scales(ops::powers_of_two(part("scale").to(at::kInt).sub(127)));
    if (f.element == MXElement::int8) {
      const auto integers = codes_.to(at::kByte).view(at::kChar).to(at::kInt);
      // q / 64 times the scale is q times scale / 64, unless that is below float32's smallest number.
      if (scale.numel() == 0 || scale.min().item<double>() >= 0x1p-120) {
        dequantize(integers, 8, true, scale / 64.0, at::zeros({}, at::kInt));
        return std::move(form_);
      }
      const auto numbers = at::arange(256, at::kInt).to(at::kByte).view(at::kChar).to(at::kFloat) / 64.0;
      return table(numbers, scales("weight_scale", scale));
    }
    if (f.element == MXElement::e4m3 || f.element == MXElement::e5m2) {
      return float8(f.element == MXElement::e4m3, scale);
    }
    return table(numbers_of(element_float(f.element)), scales("weight_scale", scale));
  }
  OnnxWeightForm operator()(const NVFP4&) {
    need(kFloat8Opset, "NVFP4's scales");
    const auto whole = tensor("weight_tensor_scale", part("tensor_scale").reshape({}));
    const auto scale = tensor("weight_scale", of_scales(part("scale")));
    const auto product = node("DequantizeLinear", {scale, whole}, {}, at::kFloat, scale_shape_);
    return table(numbers_of(Minifloat::e2m1()), product);
  }
  OnnxWeightForm operator()(const NF4& f) {
    const at::Tensor numbers =
        at::tensor(at::ArrayRef<float>(ops::kNormalFloat.data(), ops::kNormalFloat.size()), at::kFloat);
    if (!f.double_quantized) {
      return table(numbers, scales("weight_scale", of_scales(part("scale"))));
    }
    return table(numbers, doubled_scales(f));
  }
  OnnxWeightForm operator()(const Codebook& f) {
    auto index = indices();
    const auto book = part("codebook");
    if (book.numel() > f.entries) {  // several: each code counts from the first entry of its own
      auto first = at::arange(book.numel() / f.entries, at::kInt) * f.entries;
      index = node("Add", {index, spread(tensor("weight_first", of_scales(first)), at::kInt)}, {}, at::kInt, shape_);
    }
    const auto flat = tensor("weight_codebook", book.reshape({-1}));
    node("Gather", {flat, index}, {{"axis", int64_t{0}}}, at::kFloat, shape_);
    return std::move(form_);
  }

 private:
  using Attributes = std::vector<std::pair<std::string, std::variant<int64_t, Sizes>>>;

  void need(int64_t opset, const char* what) const {
    TORCH_CHECK_VALUE(options_.opset >= opset, "[onnx_weight_form] ", what, " need operator set ", opset, ", got ",
                      options_.opset, " for ", parts_.scheme.str());
  }
  const at::Tensor& part(const char* name) const {
    const auto found = parts_.tensors.find(name);
    TORCH_CHECK_VALUE(found != parts_.tensors.end(), "[onnx_weight_form] parts of ", parts_.scheme.str(),
                      " must have '", name, "', got none");
    return found->second;
  }
  /// A parameter with one element per scale, in as many axes as the weight.
  at::Tensor of_scales(const at::Tensor& values) const {
    auto stored = scale_shape_;
    if (options_.transposed) {
      std::swap(*(stored.end() - 1), *(stored.end() - 2));
      return values.reshape(stored).transpose(-2, -1).contiguous();
    }
    return values.reshape(stored).contiguous();
  }

  std::string tensor(const std::string& name, const at::Tensor& values, bool is_int4 = false) {
    form_.tensors.push_back({name, values.contiguous(), is_int4});
    return name;
  }
  std::string node(const std::string& op, std::vector<std::string> inputs, Attributes attributes, at::ScalarType dtype,
                   Sizes shape) {
    const auto output = "node_" + std::to_string(form_.nodes.size());
    form_.nodes.push_back({op, std::move(inputs), output, std::move(attributes), dtype, std::move(shape)});
    return output;
  }

  /// Integers in the smallest type that holds `bits`.
  std::string integers(const std::string& name, const at::Tensor& values, int64_t bits, bool is_signed) {
    const bool is_int4 = bits <= 4 && options_.opset >= kBlockOpset;
    if (bits > 8) {
      need(kBlockOpset, "integers of more than 8 bits");
    }
    const auto type = bits > 8 ? (is_signed ? at::kShort : at::kUInt16) : (is_signed ? at::kChar : at::kByte);
    return tensor(name, values.to(type), is_int4);
  }

  /// DequantizeLinear's scales and zero points: those of all axes but one are the same or one for each index.
  struct Shared {
    std::vector<at::Tensor> parameters;
    Attributes attributes;
  };
  Shared share(std::vector<at::Tensor> parameters) const {
    Sizes divided;
    for (size_t i = 0; i < shape_.size(); ++i) {
      if (scale_shape_[i] > 1) {
        divided.push_back(static_cast<int64_t>(i));
      }
    }
    const auto reshaped = [&](const Sizes& sizes) {
      for (auto& parameter : parameters) {
        parameter = parameter.reshape(sizes);
      }
    };
    if (divided.empty()) {
      reshaped({});
      return {parameters, {}};
    }
    if (divided.size() == 1 && blocks_[divided[0]] == 1) {
      reshaped({-1});
      return {parameters, {{"axis", divided[0]}}};
    }
    need(kBlockOpset, "scales in blocks");
    // Along one axis in blocks, along the others one scale for each index.
    auto axis = divided.back();
    for (const auto candidate : divided) {
      axis = blocks_[candidate] > 1 ? candidate : axis;
    }
    for (auto& parameter : parameters) {
      for (size_t i = 0; i < shape_.size(); ++i) {
        const auto along = static_cast<int64_t>(i);
        if (along != axis && blocks_[i] > 1) {
          parameter = parameter.repeat_interleave(blocks_[i], along).narrow(along, 0, shape_[i]);
        }
      }
    }
    return {parameters, {{"axis", axis}, {"block_size", blocks_[axis]}}};
  }

  void dequantize(const at::Tensor& values, int64_t bits, bool is_signed, const at::Tensor& scale,
                  const at::Tensor& zero_point) {
    check_scale(scale);
    const bool has_zeros = !zero_point.any().item<bool>();
    auto shared = share({scale, zero_point.dim() == 0 ? zero_point.expand(scale.sizes()) : zero_point});
    std::vector<std::string> inputs{integers("weight", values, bits, is_signed),
                                    tensor("weight_scale", shared.parameters[0])};
    if (options_.zero_points || !has_zeros) {
      inputs.push_back(integers("weight_zero_point", shared.parameters[1], bits, is_signed));
    }
    node("DequantizeLinear", inputs, shared.attributes, at::kFloat, shape_);
  }
  OnnxWeightForm signs(const at::Tensor& values) {
    dequantize(values, 2, true, of_scales(part("scale")), at::zeros({}, at::kInt));
    return std::move(form_);
  }
  OnnxWeightForm float8(bool is_e4m3, const at::Tensor& scale) {
    need(kFloat8Opset, "numbers in FP8");
    check_scale(scale);
    const auto shared = share({scale});
    const auto type = is_e4m3 ? at::kFloat8_e4m3fn : at::kFloat8_e5m2;
    const auto values = tensor("weight", codes_.to(at::kByte).view(type));
    node("DequantizeLinear", {values, tensor("weight_scale", shared.parameters[0])}, shared.attributes, at::kFloat,
         shape_);
    return std::move(form_);
  }

  static at::Tensor numbers_of(const Minifloat& f) {
    const auto values = ops::minifloat_values(ops::minifloat_shape("onnx_weight_form", f.exponent_bits, f.mantissa_bits,
                                                                   f.bias, str(f.specials), f.saturate));
    return at::tensor(at::ArrayRef<float>(values), at::kFloat);
  }
  std::string scales(const std::string& name, const at::Tensor& scale) {
    check_scale(scale);
    return tensor(name, scale);
  }
  void check_scale(const at::Tensor& scale) const {
    TORCH_CHECK_VALUE(scale.scalar_type() == at::kFloat, "[onnx_weight_form] scales must be float32, got ",
                      scale.scalar_type(), " for ", parts_.scheme.str());
  }
  /// The codes as Gather takes them: int32, from as few bits as there are types for.
  std::string indices() {
    const auto codes = integers("weight", codes_, parts_.scheme.bits, /*is_signed=*/false);
    return node("Cast", {codes}, {{"to", int64_t{6}}}, at::kInt, shape_);
  }
  /// A parameter with one element per scale, repeated over the elements that share it; axes that have one element stay so.
  std::string spread(std::string value, at::ScalarType dtype) {
    auto shape = scale_shape_;
    for (size_t i = 0; i < shape_.size(); ++i) {
      if (scale_shape_[i] > 1 && blocks_[i] > 1) {
        const auto places = at::arange(shape_[i], at::kLong).floor_divide(blocks_[i]);
        shape[i] = shape_[i];
        const auto index = tensor("weight_blocks_" + std::to_string(i), places);
        value = node("Gather", {value, index}, {{"axis", static_cast<int64_t>(i)}}, dtype, shape);
      }
    }
    return value;
  }
  /// The scales of double-quantized NF4, which have scales themselves.
  std::string doubled_scales(const NF4& f) {
    // In the order in which they were quantized: a row of them for each scale of their own, the last one filled up. (OpenVINO
    // has no scales in blocks of a tensor of one axis.)
    auto codes = part("scale").reshape({-1});
    const auto count = codes.numel(), rows = part("scale_scale").numel(), more = rows * f.scale_block - count;
    const bool one = rows == 1;
    const Sizes sizes = one ? Sizes{count} : Sizes{rows, f.scale_block};
    codes = one ? codes : at::constant_pad_nd(codes, {0, more}).reshape(sizes);
    const auto scale = tensor("weight_scale", codes),
               step = tensor("weight_scale_scale", part("scale_scale").reshape(one ? Sizes{} : Sizes{-1}));
    const auto along_rows = one ? Attributes{} : Attributes{{"axis", int64_t{0}}};
    auto found = node("DequantizeLinear", {scale, step}, along_rows, at::kFloat, sizes);
    found = node("Add", {found, tensor("weight_scale_mean", part("scale_mean").reshape({}))}, {}, at::kFloat, sizes);
    found = node("Max", {found, tensor("weight_scale_min", at::full({}, kSmallestScale))}, {}, at::kFloat, sizes);
    if (!one && more > 0) {
      const auto number = [&](const char* name, int64_t value) {
        return tensor(name, at::full({1}, value, at::kLong));
      };
      found = node("Reshape", {found, number("weight_scale_flat", -1)}, {}, at::kFloat, {rows * f.scale_block});
      found = node("Slice", {found, number("weight_scale_begin", 0), number("weight_scale_end", count)}, {}, at::kFloat,
                   {count});
    }
    auto stored = scale_shape_;
    if (options_.transposed) {
      std::swap(*(stored.end() - 1), *(stored.end() - 2));
    }
    found =
        node("Reshape", {found, tensor("weight_scale_shape", at::tensor(stored, at::kLong))}, {}, at::kFloat, stored);
    if (options_.transposed) {
      Sizes order(stored.size());
      std::iota(order.begin(), order.end(), 0);
      std::swap(*(order.end() - 1), *(order.end() - 2));
      found = node("Transpose", {found}, {{"perm", order}}, at::kFloat, scale_shape_);
    }
    return found;
  }
  OnnxWeightForm table(const at::Tensor& numbers, const std::string& scale) {
    const auto name = tensor("weight_numbers", numbers);
    const auto found = node("Gather", {name, indices()}, {{"axis", int64_t{0}}}, at::kFloat, shape_);
    node("Mul", {found, spread(scale, at::kFloat)}, {}, at::kFloat, shape_);
    return std::move(form_);
  }

  const QuantizedTensorParts& parts_;
  const OnnxWeightOptions& options_;
  Sizes shape_, blocks_, scale_shape_;  // as they are written
  at::Tensor codes_;
  OnnxWeightForm form_;
};

}  // namespace

OnnxWeightForm onnx_weight_form(const QuantizedTensorParts& parts, const OnnxWeightOptions& options) {
  TORCH_CHECK_VALUE(parts.dtype == at::kFloat, "[onnx_weight_form] the weight must be float32, got ", parts.dtype);
  TORCH_CHECK_VALUE(!options.transposed || parts.shape.size() >= 2,
                    "[onnx_weight_form] a weight with two axes can be transposed, got ", parts.shape.size());
  return std::visit(Writer(parts, options), parts.scheme.format);
}

}  // namespace rarefy
