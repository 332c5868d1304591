#include "quantization/packed_rows.h"

#include <rarefy/quantization/packed_weight.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstring>
#include <functional>
#include <numeric>
#include <tuple>

#include "ops/cpu/block_scales.h"
#include "ops/cpu/packed_simd.h"
#include "ops/minifloat.h"
#include "quantization/packed_codes.h"

namespace rarefy::quantization {
namespace {

int64_t count_of(const std::vector<int64_t>& sizes) {
  return std::accumulate(sizes.begin(), sizes.end(), int64_t{1}, std::multiplies<>());
}

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

/// Whether the scales are means of the values, in their type where that is float64.
bool has_own_magnitudes(const Scheme& scheme) {
  return std::holds_alternative<Binary>(scheme.format) || std::holds_alternative<Ternary>(scheme.format);
}

/// The type and the number of elements of each part.
struct Expected {
  at::ScalarType type;
  int64_t count;
};

Expected expected_of(const std::string& name, const QuantizedTensorParts& parts) {
  const auto& [scheme, shape] = std::tie(parts.scheme, parts.shape);
  const int64_t n = count_of(shape), scales = count_of(scheme.scale_shape(shape));
  const auto* nf4 = std::get_if<NF4>(&scheme.format);
  const bool doubled = nf4 != nullptr && nf4->double_quantized;
  if (name == "data") {
    const auto type = stored_type(scheme);
    return type.has_value() ? Expected{*type, n} : Expected{at::kByte, ceil_div(n * scheme.bits, 8)};
  }
  if (name == "scale") {
    const auto type = std::holds_alternative<MX>(scheme.format)                  ? at::kByte
                      : std::holds_alternative<NVFP4>(scheme.format)             ? at::kFloat8_e4m3fn
                      : doubled                                                  ? at::kChar
                      : has_own_magnitudes(scheme) && parts.dtype == at::kDouble ? at::kDouble
                                                                                 : at::kFloat;
    return {type, scales};
  }
  if (name == "zero_point") {
    return {at::kInt, scales};
  }
  if (name == "scale_scale") {
    return {at::kFloat, ceil_div(scales, nf4->scale_block)};
  }
  if (name == "codebook") {
    return {at::kFloat, scales * std::get<Codebook>(scheme.format).entries};
  }
  return {at::kFloat, 1};  // tensor_scale, scale_mean
}

}  // namespace

std::vector<std::string> part_names(const Scheme& scheme) {
  if (std::holds_alternative<Codebook>(scheme.format)) {
    return {"data", "codebook"};
  }
  if (std::holds_alternative<NVFP4>(scheme.format)) {
    return {"data", "scale", "tensor_scale"};
  }
  const auto* nf4 = std::get_if<NF4>(&scheme.format);
  if (nf4 != nullptr && nf4->double_quantized) {
    return {"data", "scale", "scale_scale", "scale_mean"};
  }
  return scheme.is_integer() && !scheme.symmetric ? std::vector<std::string>{"data", "scale", "zero_point"}
                                                  : std::vector<std::string>{"data", "scale"};
}

QuantizedTensorParts parts_of(const std::vector<at::Tensor>& tensors, const Scheme& scheme, std::vector<int64_t> shape,
                              at::ScalarType dtype) {
  const auto names = part_names(scheme);
  TORCH_CHECK_VALUE(tensors.size() == names.size(), "[parts_of] ", scheme.str(), " must have ", names.size(),
                    " parts, got ", tensors.size());
  QuantizedTensorParts parts{scheme, std::move(shape), dtype, {}};
  for (size_t i = 0; i < names.size(); ++i) {
    parts.tensors[names[i]] = tensors[i];
  }
  return parts;
}

void check_parts(const char* function, const QuantizedTensorParts& parts) {
  for (const auto& name : part_names(parts.scheme)) {
    const auto found = parts.tensors.find(name);
    TORCH_CHECK_VALUE(found != parts.tensors.end(), "[", function, "] parts of ", parts.scheme.str(), " must have '",
                      name, "', got none");
    const auto [type, count] = expected_of(name, parts);
    TORCH_CHECK_VALUE(found->second.scalar_type() == type && found->second.numel() == count, "[", function, "] '", name,
                      "' of ", parts.scheme.str(), " must be ", type, " and have ", count, " elements, got ",
                      found->second.scalar_type(), " and ", found->second.numel());
  }
}

PackedRows::PackedRows(const char* function, const QuantizedTensorParts& parts) : parts_(parts) {
  check_parts(function, parts);
  TORCH_CHECK_VALUE(!parts.shape.empty(), "[", function, "] a packed tensor must have a dimension, got none");
  const auto& scheme = parts.scheme;
  for (const auto& name : part_names(scheme)) {
    const auto& tensor = parts.tensors.at(name);
    TORCH_CHECK_VALUE(tensor.device().is_cpu(), "[", function, "] '", name, "' must be on the CPU, got ",
                      tensor.device());
    kept_[name] = tensor.contiguous();
  }
  data_ = static_cast<const uint8_t*>(kept_.at("data").const_data_ptr());
  bits_ = stored_type(scheme).has_value() ? 8 : scheme.bits;
  is_integer_ = scheme.is_integer();
  if (const auto* codebook = std::get_if<Codebook>(&scheme.format)) {
    codebook_ = kept_.at("codebook").const_data_ptr<float>();
    entries_ = codebook->entries;
  } else if (is_integer_) {
    lowest_ = scheme.qmin();
    zero_ = static_cast<float>(((scheme.qmin() + scheme.qmax() + 1) >> 1) - scheme.qmin());
    zeros_ = scheme.symmetric ? nullptr : kept_.at("zero_point").const_data_ptr<int32_t>();
  } else {
    table_ = code_table(scheme);
    table_.resize(std::max<size_t>(table_.size(), 16), 0.0f);  // as wide as the registers that hold it
  }
  rows_ = parts.shape[0];
  width_ = rows_ == 0 ? 0 : count_of(parts.shape) / rows_;
  lay_out(parts.shape);
}

void PackedRows::lay_out(const std::vector<int64_t>& shape) {
  const auto& scheme = parts_.scheme;
  const auto rank = static_cast<int64_t>(shape.size());
  const auto wrapped = [rank](int64_t axis) { return static_cast<size_t>(axis < 0 ? axis + rank : axis); };
  // The scale of an element: the sum over its dimensions of index / size * stride.
  std::vector<int64_t> size(shape.size(), 1), stride(shape.size(), 0);
  const auto of_blocks = [&] {
    const auto scales = scheme.scale_shape(shape);
    int64_t product = 1;
    for (size_t d = shape.size(); d-- > 0;) {
      stride[d] = product;
      product *= scales[d];
    }
  };
  if (const auto* channel = std::get_if<PerChannel>(&scheme.granularity)) {
    stride[wrapped(channel->axis)] = 1;
  } else if (const auto* group = std::get_if<PerGroup>(&scheme.granularity)) {
    of_blocks();
    size[wrapped(group->axis)] = group->size;
  } else if (const auto* block = std::get_if<PerBlock>(&scheme.granularity)) {
    of_blocks();
    size[shape.size() - 2] = block->rows;
    size[shape.size() - 1] = block->columns;
  } else if (std::holds_alternative<PerToken>(scheme.granularity)) {
    of_blocks();
    size.back() = std::max<int64_t>(shape.back(), 1);
  }
  tall_ = size[0];
  stride_ = stride[0];
  for (int64_t c = 0; c < width_; ++c) {
    int64_t rest = c, offset = 0;
    for (size_t d = shape.size(); d-- > 1;) {
      offset += rest % shape[d] / size[d] * stride[d];
      rest /= shape[d];
    }
    last_offset_ = std::max(last_offset_, offset);
    if (!runs_.empty() && runs_.back().offset == offset) {
      runs_.back().end = c + 1;
    } else {
      runs_.push_back({c, c + 1, offset});
    }
  }
}

void PackedRows::read_scales(int64_t begin, int64_t end, float* out) const {
  const auto& tensors = kept_;
  const auto& scale = tensors.at("scale");
  const auto* nf4 = std::get_if<NF4>(&parts_.scheme.format);
  if (std::holds_alternative<MX>(parts_.scheme.format)) {
    const auto* exponents = scale.const_data_ptr<uint8_t>();
    for (int64_t i = begin; i < end; ++i) {
      out[i - begin] = std::ldexp(1.0f, exponents[i] - 127);
    }
  } else if (std::holds_alternative<NVFP4>(parts_.scheme.format)) {
    const auto* values = scale.const_data_ptr<c10::Float8_e4m3fn>();
    const float whole = *tensors.at("tensor_scale").const_data_ptr<float>();
    for (int64_t i = begin; i < end; ++i) {
      out[i - begin] = static_cast<float>(values[i]) * whole;
    }
  } else if (nf4 != nullptr && nf4->double_quantized) {
    const auto* codes = scale.const_data_ptr<int8_t>();
    const auto* steps = tensors.at("scale_scale").const_data_ptr<float>();
    const float mean = *tensors.at("scale_mean").const_data_ptr<float>();
    for (int64_t i = begin; i < end; ++i) {
      out[i - begin] = ops::double_dequantized(codes[i], mean, steps[i / nf4->scale_block]);
    }
  } else {
    std::copy_n(scale.const_data_ptr<float>() + begin, end - begin, out);
  }
}

template <typename Code>
void PackedRows::read_codes(int64_t row, Code* out) const {
  const int64_t bytes = ceil_div(rows_ * width_ * bits_, 8), mask = (int64_t{1} << bits_) - 1;
  for (int64_t i = 0; i < width_; ++i) {
    const int64_t bit = (row * width_ + i) * bits_, at = bit / 8;
    uint32_t window = 0;  // the three bytes that may hold the code
    std::memcpy(&window, data_ + at, static_cast<size_t>(std::min<int64_t>(3, bytes - at)));
    out[i] = static_cast<Code>(window >> (bit % 8) & mask);
  }
}

void PackedRows::read_row(const uint8_t* codes, const float* scales, int64_t first, float* out) const {
  constexpr int64_t kShort = 8;  // elements below which a call costs more than they do
  const bool is_small = bits_ <= 4;
  std::array<float, 16> book{};
  for (const auto& run : runs_) {
    const int64_t n = run.end - run.begin, scale_index = first + run.offset;
    const auto* from = codes + run.begin;
    auto* to = out + run.begin;
    if (is_integer_) {
      const float zero = zero_of(scale_index), scale = scales[run.offset];
      if (n >= kShort) {
        RAREFY_ISA_CALL(scaled_integers, from, n, zero, scale, to);
      } else {
        std::transform(from, from + n, to, [=](uint8_t code) { return (static_cast<float>(code) - zero) * scale; });
      }
      continue;
    }
    const float* table = codebook_ == nullptr ? table_.data() : codebook_ + scale_index * entries_;
    const float scale = codebook_ == nullptr ? scales[run.offset] : 1.0f;
    if (n < kShort) {
      std::transform(from, from + n, to, [=](uint8_t code) { return table[code] * scale; });
      continue;
    }
    if (is_small && codebook_ != nullptr) {  // as wide as the registers that hold it
      std::copy_n(table, std::min<int64_t>(entries_, 16), book.begin());
      table = book.data();
    }
    RAREFY_ISA_CALL(scaled_table, from, n, table, is_small, scale, to);
  }
}

void PackedRows::read_wide_row(const uint16_t* codes, const float* scales, int64_t first, float* out) const {
  for (const auto& run : runs_) {
    const float zero = zero_of(first + run.offset), scale = scales[run.offset];
    for (int64_t i = run.begin; i < run.end; ++i) {
      out[i] = (static_cast<float>(codes[i]) - zero) * scale;
    }
  }
}

void PackedRows::read(int64_t begin, int64_t end, float* out) const {
  if (begin >= end || width_ == 0) {
    return;
  }
  const int64_t low = first_scale(begin), high = first_scale(end - 1) + last_offset_ + 1;
  std::vector<float> scales;
  if (codebook_ == nullptr) {
    scales.resize(static_cast<size_t>(high - low));
    read_scales(low, high, scales.data());
  }
  std::vector<uint8_t> codes(bits_ < 8 ? static_cast<size_t>(width_) : 0);
  std::vector<uint16_t> wide(bits_ > 8 ? static_cast<size_t>(width_) : 0);
  for (int64_t row = begin; row < end; ++row, out += width_) {
    const int64_t first = first_scale(row), at = row * width_;
    const float* own = scales.data() + (codebook_ == nullptr ? first - low : 0);
    if (bits_ == 8) {
      read_row(data_ + at, own, first, out);
    } else if (bits_ > 8) {
      read_codes(row, wide.data());
      read_wide_row(wide.data(), own, first, out);
    } else if (bits_ == 4 && at % 2 == 0) {
      RAREFY_ISA_CALL(split_nibbles, data_ + at / 2, width_, codes.data());
      read_row(codes.data(), own, first, out);
    } else {
      read_codes(row, codes.data());
      read_row(codes.data(), own, first, out);
    }
  }
}

}  // namespace rarefy::quantization
