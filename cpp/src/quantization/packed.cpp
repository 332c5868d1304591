#include <ATen/ops/arange.h>
#include <ATen/ops/constant_pad_nd.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/frexp.h>
#include <ATen/ops/tensor.h>
#include <ATen/ops/zeros.h>
#include <rarefy/ops/formats.h>
#include <rarefy/ops/weight_formats.h>
#include <rarefy/quantization/packed.h>
#include <rarefy/quantization/simulate.h>

#include <cmath>

#include "ops/block_views.h"
#include "ops/cpu/block_scales.h"
#include "ops/nf4.h"
#include "quantization/packed_codes.h"

namespace rarefy::quantization {
namespace {

ops::MinifloatShape shape_of(const Minifloat& f) {
  return ops::minifloat_shape("quantize_to", f.exponent_bits, f.mantissa_bits, f.bias, str(f.specials), f.saturate);
}

/// The minifloat of the elements, where they are one.
std::optional<ops::MinifloatShape> element_shape(const Scheme& scheme) {
  if (const auto* f = std::get_if<Minifloat>(&scheme.format)) {
    return shape_of(*f);
  }
  if (const auto* f = std::get_if<MX>(&scheme.format)) {
    return shape_of(element_float(f->element));
  }
  return std::holds_alternative<NVFP4>(scheme.format) ? std::optional(ops::e2m1_shape()) : std::nullopt;
}

bool is_mx_int8(const Scheme& scheme) {
  const auto* mx = std::get_if<MX>(&scheme.format);
  return mx != nullptr && mx->element == MXElement::int8;
}

ops::Sharing sharing_of(const at::Tensor& x, const Scheme& scheme) {
  std::vector<c10::SymInt> block;
  for (const auto size : scheme.block()) {
    block.emplace_back(size);
  }
  return ops::check_sharing("quantize_to", x, scheme.block_axis(), block);
}

// --- Streams of bits ----------------------------------------------------------------------------------------------------

at::Tensor pack(const at::Tensor& codes, int64_t bits) {
  const int64_t n = codes.numel();
  auto data = at::zeros({(n * bits + 7) / 8}, at::kByte);
  auto* bytes = data.data_ptr<uint8_t>();
  const auto* code = codes.const_data_ptr<int32_t>();
  for (int64_t i = 0; i < n; ++i) {
    for (int64_t bit = 0; bit < bits;) {  // a piece for each byte that the code touches
      const int64_t at = i * bits + bit, room = std::min(8 - at % 8, bits - bit);
      const auto piece = static_cast<uint32_t>(code[i]) >> bit & ((1u << room) - 1u);
      bytes[at / 8] = static_cast<uint8_t>(bytes[at / 8] | piece << (at % 8));
      bit += room;
    }
  }
  return data;
}

/// The same by torch's operators, for other devices: the three bytes that may hold each code, shifted.
at::Tensor unpack_anywhere(const at::Tensor& data, int64_t n, int64_t bits) {
  const auto at_bit = at::arange(n, data.options().dtype(at::kLong)) * bits;
  const auto first = at_bit.div(8, "trunc"), bytes = at::constant_pad_nd(data, {0, 2}).to(at::kInt);
  const auto byte = [&](int64_t i) { return bytes.index_select(0, first + i).bitwise_left_shift(8 * i); };
  const auto window = byte(0).bitwise_or(byte(1)).bitwise_or(byte(2));
  return window.bitwise_right_shift(at_bit.remainder(8).to(at::kInt)).bitwise_and((int64_t{1} << bits) - 1);
}

at::Tensor unpack(const at::Tensor& data, int64_t n, int64_t bits) {
  if (!data.device().is_cpu()) {
    return unpack_anywhere(data, n, bits);
  }
  auto codes = at::empty({n}, at::kInt);
  auto* code = codes.data_ptr<int32_t>();
  const auto* bytes = data.const_data_ptr<uint8_t>();
  for (int64_t i = 0; i < n; ++i) {
    uint32_t value = 0;
    for (int64_t bit = 0; bit < bits;) {
      const int64_t at = i * bits + bit, room = std::min(8 - at % 8, bits - bit);
      value |= (static_cast<uint32_t>(bytes[at / 8]) >> (at % 8) & ((1u << room) - 1u)) << bit;
      bit += room;
    }
    code[i] = static_cast<int32_t>(value);
  }
  return codes;
}

// --- Codes ----------------------------------------------------------------------------------------------------------------

/// code(y) of every element of x / scale, int32 in x's order.
template <typename T, typename Code>
at::Tensor typed_codes(const at::Tensor& x, const ops::Sharing& sharing, const at::Tensor& scale, const Code& code) {
  const auto type = std::is_same_v<T, double> ? at::kDouble : at::kFloat;
  const at::Tensor y = (ops::to_blocks(x.to(type), sharing, 0.0) / scale.reshape({-1, 1}).to(type)).contiguous();
  at::Tensor codes = at::empty(y.sizes(), at::kInt);
  const T* in = y.const_data_ptr<T>();
  auto* out = codes.data_ptr<int32_t>();
  const int64_t per_block = y.size(1);
  for (int64_t i = 0; i < y.numel(); ++i) {
    out[i] = code(in[i], i / per_block);
  }
  return ops::from_blocks(codes, x, sharing).contiguous();
}

template <typename Code>
at::Tensor codes_of(const at::Tensor& x, const ops::Sharing& sharing, const at::Tensor& scale, const Code& code) {
  return x.scalar_type() == at::kDouble ? typed_codes<double>(x, sharing, scale, code)
                                        : typed_codes<float>(x, sharing, scale, code);
}

/// Scales of blocks, spread over x's elements: [elements].
at::Tensor spread(const at::Tensor& scale, const at::Tensor& like, const ops::Sharing& sharing, at::ScalarType type) {
  const auto columns = ops::to_blocks(like, sharing, 0.0);
  return ops::from_blocks(scale.reshape({-1, 1}).to(type).expand_as(columns), like, sharing).reshape(-1);
}

struct Packer {
  const at::Tensor& x;
  const Scheme& scheme;
  const ops::Sharing sharing;
  at::Tensor scale, zero_point;
  std::map<std::string, at::Tensor>& tensors;

  at::Tensor operator()(const Integer&) {
    const auto zeros = zero_point.contiguous();
    const auto* z = zeros.const_data_ptr<int32_t>();
    const int64_t qmin = scheme.qmin(), qmax = scheme.qmax();
    tensors["scale"] = scale;
    if (!scheme.symmetric) {
      tensors["zero_point"] = zero_point;
    }
    return codes_of(x, sharing, scale, [=](auto y, int64_t block) {
      const auto q = static_cast<double>(std::nearbyint(y)) + static_cast<double>(z[block]);
      return static_cast<int32_t>(std::clamp(q, static_cast<double>(qmin), static_cast<double>(qmax)) -
                                  static_cast<double>(qmin));
    });
  }
  at::Tensor floats(const at::Tensor& by) const {
    const auto f = *element_shape(scheme);
    const bool two_complement = is_mx_int8(scheme);
    return codes_of(x, sharing, by, [f, two_complement](auto y, int64_t) -> int32_t {
      const auto value = static_cast<double>(ops::round_to_minifloat(y, f));
      return two_complement ? static_cast<int32_t>(value * 64.0) & 0xff : ops::minifloat_code(value, f);
    });
  }
  at::Tensor operator()(const Minifloat&) {
    tensors["scale"] = scale;
    return floats(scale);
  }
  at::Tensor operator()(const MX&) {
    tensors["scale"] = std::get<1>(at::frexp(scale)).add(126).to(at::kByte);
    return floats(scale);
  }
  at::Tensor operator()(const NVFP4&) {
    const auto whole = ops::nvfp4_tensor_scale(x);
    tensors["tensor_scale"] = whole;
    tensors["scale"] = scale.to(at::kFloat8_e4m3fn);
    return floats(scale * whole);
  }
  at::Tensor operator()(const NF4& f) {
    tensors["scale"] = scale;
    if (f.double_quantized) {
      const auto& group = std::get<PerGroup>(scheme.granularity);
      const auto plain = ops::nf4_scale(x, group.size, 0, group.axis);
      const auto* values = plain.const_data_ptr<float>();
      const int64_t n = plain.numel(), blocks = (n + f.scale_block - 1) / f.scale_block;
      const float mean = ops::double_quantized_mean(values, n);
      auto codes = at::empty(plain.sizes(), at::kChar);
      auto steps = at::empty({blocks}, at::kFloat);
      for (int64_t b = 0; b < blocks; ++b) {
        const int64_t end = std::min((b + 1) * f.scale_block, n);
        const float step = ops::double_quantized_step(values, b * f.scale_block, end, mean);
        steps.data_ptr<float>()[b] = step;
        for (int64_t i = b * f.scale_block; i < end; ++i) {
          codes.data_ptr<int8_t>()[i] = ops::double_quantized(values[i], mean, step);
        }
      }
      tensors["scale"] = codes;
      tensors["scale_scale"] = steps;
      tensors["scale_mean"] = at::tensor({mean}, at::kFloat);
    }
    return codes_of(x, sharing, scale, [](auto y, int64_t) { return static_cast<int32_t>(ops::normal_float_code(y)); });
  }
  /// Signs and zeros of what simulate gives, and its one magnitude for each block.
  at::Tensor of_signs(bool with_zero) {
    const auto rounded = simulate(x, {}, {}, scheme).to(x.scalar_type() == at::kDouble ? at::kDouble : at::kFloat);
    const auto magnitude = ops::to_blocks(rounded.abs(), sharing, 0.0).amax(1);
    tensors["scale"] = magnitude.reshape_symint(ops::scale_sizes(x, sharing));
    return (with_zero ? rounded.sign() + 1 : rounded.ge(0.0)).to(at::kInt).contiguous();
  }
  at::Tensor operator()(const Binary&) { return of_signs(false); }
  at::Tensor operator()(const Ternary&) { return of_signs(true); }
  at::Tensor operator()(const Codebook&) {
    tensors["codebook"] = scale;
    std::vector<c10::SymInt> block;
    for (const auto size : scheme.block()) {
      block.emplace_back(size);
    }
    return ops::codebook_indices(x, scale, scheme.block_axis(), block).to(at::kInt).contiguous();
  }
};

const at::Tensor& part(const QuantizedTensorParts& parts, const char* name) {
  const auto found = parts.tensors.find(name);
  TORCH_CHECK_VALUE(found != parts.tensors.end(), "[dequantize] parts of ", parts.scheme.str(), " must have '", name,
                    "', got none");
  return found->second;
}

/// The scales of the elements as they were when the codes were made.
at::Tensor scales_of_parts(const QuantizedTensorParts& parts) {
  const auto& scale = part(parts, "scale");
  if (std::holds_alternative<MX>(parts.scheme.format)) {
    return ops::powers_of_two(scale.to(at::kInt).sub(127));
  }
  if (std::holds_alternative<NVFP4>(parts.scheme.format)) {
    return scale.to(at::kFloat) * part(parts, "tensor_scale");
  }
  const auto* nf4 = std::get_if<NF4>(&parts.scheme.format);
  if (nf4 != nullptr && nf4->double_quantized) {
    const auto codes = scale.contiguous(), steps = part(parts, "scale_scale").contiguous();
    const int64_t n = codes.numel();
    TORCH_CHECK_VALUE(steps.numel() == (n + nf4->scale_block - 1) / nf4->scale_block,
                      "[dequantize] scale_scale must have one element per ", nf4->scale_block, " scales, got ",
                      steps.numel(), " for ", n);
    const auto step = steps.repeat_interleave(nf4->scale_block).narrow(0, 0, n).view(codes.sizes());
    return (codes.to(at::kFloat) * step + part(parts, "scale_mean")).clamp_min(kSmallestScale);
  }
  return scale;
}

}  // namespace

std::optional<at::ScalarType> stored_type(const Scheme& scheme) {
  auto elements = std::get_if<Minifloat>(&scheme.format) == nullptr ? Minifloat{} : std::get<Minifloat>(scheme.format);
  if (const auto* mx = std::get_if<MX>(&scheme.format)) {
    elements = element_float(mx->element);
  } else if (!std::holds_alternative<Minifloat>(scheme.format)) {
    return std::nullopt;
  }
  elements.saturate = true;
  return elements == Minifloat::e4m3()   ? std::optional(at::kFloat8_e4m3fn)
         : elements == Minifloat::e5m2() ? std::optional(at::kFloat8_e5m2)
                                         : std::nullopt;
}

std::vector<float> code_table(const Scheme& scheme) {
  if (is_mx_int8(scheme)) {
    std::vector<float> values;
    for (int code = 0; code < 256; ++code) {
      values.push_back(static_cast<float>(static_cast<int8_t>(code)) / 64.0f);
    }
    return values;
  }
  if (const auto f = element_shape(scheme)) {
    return ops::minifloat_values(*f);
  }
  if (std::holds_alternative<NF4>(scheme.format)) {
    return {ops::kNormalFloat.begin(), ops::kNormalFloat.end()};
  }
  return std::holds_alternative<Binary>(scheme.format) ? std::vector<float>{-1.0f, 1.0f}
                                                       : std::vector<float>{-1.0f, 0.0f, 1.0f, 0.0f};
}

int64_t QuantizedTensorParts::nbytes() const {
  int64_t bytes = 0;
  for (const auto& [name, tensor] : tensors) {
    bytes += static_cast<int64_t>(tensor.nbytes());
  }
  return bytes;
}

QuantizedTensorParts quantize_to(const at::Tensor& x, const Scheme& scheme, const std::optional<at::Tensor>& scale,
                                 const std::optional<at::Tensor>& zero_point) {
  scheme.validate();
  const auto values = x.detach().cpu();
  ops::check_float("quantize_to", values, "input");
  TORCH_CHECK_VALUE(values.isfinite().all().item<bool>(), "[quantize_to] input must be finite, got NaN or infinity");
  TORCH_CHECK_VALUE(scheme.rounding == Rounding::nearest_even,
                    "[quantize_to] stored values are rounded to nearest, got ", scheme.str());
  QuantizedTensorParts parts{scheme, values.sizes().vec(), values.scalar_type(), {}};
  parts.scheme.noise.reset();
  at::Tensor s, z;
  const bool has_scales =
      !std::holds_alternative<Binary>(scheme.format) && !std::holds_alternative<Ternary>(scheme.format);
  if (scale.has_value()) {
    s = scale->detach().cpu();
    z = zero_point.has_value() ? zero_point->detach().cpu() : at::zeros(s.sizes(), at::kInt);
  } else if (const auto* f = std::get_if<Codebook>(&scheme.format)) {
    std::vector<c10::SymInt> block;
    for (const auto size : scheme.block()) {
      block.emplace_back(size);
    }
    s = ops::kmeans_codebook(values, f->entries, scheme.block_axis(), block);
  } else if (has_scales) {
    std::tie(s, z) = scheme_qparams(values, scheme);
  }
  Packer packer{values, scheme, sharing_of(values, scheme), s, z, parts.tensors};
  const auto codes = std::visit(packer, scheme.format);
  const auto type = stored_type(scheme);
  parts.tensors["data"] = type.has_value() ? codes.to(at::kByte).view(*type) : pack(codes, scheme.bits);
  return parts;
}

at::Tensor stored_codes(const QuantizedTensorParts& parts) {
  const auto& scheme = parts.scheme;
  const auto& data = part(parts, "data");
  const auto type = stored_type(scheme);
  const int64_t n = c10::multiply_integers(parts.shape), bytes = type.has_value() ? n : (n * scheme.bits + 7) / 8;
  TORCH_CHECK_VALUE(static_cast<int64_t>(data.nbytes()) == bytes, "[dequantize] data must have ", bytes,
                    " bytes for shape ", at::IntArrayRef(parts.shape), ", got ", data.nbytes());
  const auto codes =
      type.has_value() ? data.view(at::kByte).reshape(-1).to(at::kInt) : unpack(data.contiguous(), n, scheme.bits);
  return codes.reshape(parts.shape);
}

at::Tensor dequantize(const QuantizedTensorParts& parts) {
  const auto& scheme = parts.scheme;
  const auto like = at::empty(parts.shape, part(parts, "data").options().dtype(at::kFloat));
  const auto sharing = sharing_of(like, scheme);
  const auto codes = stored_codes(parts).reshape(-1);
  const auto computing = parts.dtype == at::kDouble ? at::kDouble : at::kFloat;
  at::Tensor values;
  if (const auto* codebook = std::get_if<Codebook>(&scheme.format); codebook != nullptr) {
    const auto blocks = ops::to_blocks(codes.to(at::kLong).reshape(parts.shape), sharing, 0.0);
    const auto table = part(parts, "codebook").reshape({blocks.size(0), codebook->entries});
    values = ops::from_blocks(table.gather(1, blocks), like, sharing).reshape(-1).to(computing);
  } else if (scheme.is_integer()) {
    values = (codes + scheme.qmin()).to(computing);
    if (!scheme.symmetric) {
      values = values - spread(part(parts, "zero_point"), like, sharing, computing);
    } else {
      values = values - static_cast<double>((scheme.qmin() + scheme.qmax() + 1) >> 1);
    }
    values = values * spread(part(parts, "scale"), like, sharing, computing);
  } else {
    const auto list = code_table(scheme);
    const auto table = at::tensor(at::ArrayRef<float>(list), at::kFloat).to(codes.device(), computing);
    values = table.index_select(0, codes) * spread(scales_of_parts(parts), like, sharing, computing);
  }
  return values.to(parts.dtype).reshape(parts.shape);
}

}  // namespace rarefy::quantization
