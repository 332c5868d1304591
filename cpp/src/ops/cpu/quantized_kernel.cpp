#include <ATen/ExpandUtils.h>
#include <ATen/ops/constant_pad_nd.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <rarefy/ops/integer.h>
#include <torch/library.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <vector>

#include "ops/cpu/dense.h"
#include "ops/cpu/integer_kernel.h"
#include "ops/cpu/onednn.h"
#include "ops/cpu/packed_weights.h"
#include "ops/cpu/quantized_simd.h"
#include "ops/quantized_checks.h"
#include "ops/quantized_ops.h"

namespace rarefy::ops {
namespace {

/// A grid as its bytes are stored: a signed range moves up by 128 with its zero point, the same numbers under other names.
struct ByteNumbers {
  float scale = 1, zero_point = 0, qmin = 0, qmax = 255;

  ByteNumbers(const char* function, const char* name, const at::Tensor& scale_, const at::Tensor& zero_point_,
              int64_t low, int64_t high) {
    scale = scale_.item<float>();
    const auto zero = zero_point_.item<int32_t>();
    TORCH_CHECK_VALUE(std::isfinite(scale) && scale > 0, "[", function, "] ", name,
                      "_scale must be finite and positive, got ", scale);
    TORCH_CHECK_VALUE(zero >= low && zero <= high, "[", function, "] ", name, "_zero_point must be within [", low, ", ",
                      high, "], got ", zero);
    const int64_t shift = low < 0 ? 128 : 0;
    zero_point = static_cast<float>(zero + shift);
    qmin = static_cast<float>(low + shift);
    qmax = static_cast<float>(high + shift);
  }

  cpu::Grid grid() const { return {&scale, &zero_point, qmin, qmax}; }
  /// The same, with what a ReLU leaves: max(y, 0) is q >= zero_point.
  ByteNumbers rectified() const {
    auto out = *this;
    out.qmin = std::max(qmin, zero_point);
    return out;
  }
  int64_t zero() const { return static_cast<int64_t>(zero_point); }
  bool operator==(const ByteNumbers&) const = default;
};

std::optional<ByteNumbers> output_numbers(const char* function, const OptionalTensor& scale,
                                          const OptionalTensor& zero_point, int64_t qmin, int64_t qmax) {
  if (!scale.has_value()) {
    return std::nullopt;
  }
  return ByteNumbers(function, "output", *scale, *zero_point, qmin, qmax);
}

/// An uninitialized tensor like x, which is dense, with another type.
at::Tensor empty_as(const at::Tensor& x, at::ScalarType type) { return at::empty_like(x, x.options().dtype(type)); }

/// The bytes of floating-point values; x is dense.
at::Tensor round_to_bytes(const at::Tensor& x, const ByteNumbers& numbers) {
  auto out = empty_as(x, at::kByte);
  const auto layout = layout_of(x, -1);
  const void* in = x.const_data_ptr();
  auto* bytes = out.data_ptr<uint8_t>();
  const auto grid = numbers.grid();
  parallel_words(x.numel(),
                 [&](int64_t begin, int64_t end) { RAREFY_ISA_CALL(quantize, in, bytes, layout, grid, begin, end); });
  return out;
}

/// The bytes of an input, dense: those that it has, or those that its values are rounded to.
at::Tensor to_bytes(const at::Tensor& x, const ByteNumbers& numbers) {
  if (x.scalar_type() == at::kByte) {
    return dense(x);
  }
  return round_to_bytes(dense(x.scalar_type() == at::kDouble ? x.to(at::kFloat) : x), numbers);
}

at::Tensor finish(const at::Tensor& y, bool relu, const std::optional<ByteNumbers>& output) {
  return output.has_value() ? round_to_bytes(y, relu ? output->rectified() : *output) : y;
}

/// One scale for each output channel. Not a number would be hidden by a ReLU, and by rounding to bytes.
at::Tensor per_channel_scale(const char* function, const at::Tensor& weight_scale, int64_t channels) {
  const auto scales = weight_scale.contiguous();
  const auto* values = scales.const_data_ptr<float>();
  for (int64_t i = 0; i < scales.numel(); ++i) {
    TORCH_CHECK_VALUE(std::isfinite(values[i]), "[", function, "] weight_scale must be finite, got ", values[i]);
  }
  return weight_scale.expand({channels}).contiguous();
}

std::optional<at::Tensor> optional_contiguous(const OptionalTensor& x) {
  return x.has_value() ? OptionalTensor(x->contiguous()) : x;
}

/// Whether the int8 kernels of this LibTorch on this processor give exact sums.
bool runs_on_onednn() {
  static const bool answer = has_exact_integer_products() && onednn::is_available();
  return answer;
}

at::Tensor quantized_linear_cpu(const at::Tensor& x, const at::Tensor& weight, const at::Tensor& weight_scale,
                                const OptionalTensor& bias, const at::Tensor& input_scale,
                                const at::Tensor& input_zero_point, int64_t qmin, int64_t qmax, bool relu,
                                const OptionalTensor& output_scale, const OptionalTensor& output_zero_point,
                                int64_t output_qmin, int64_t output_qmax) {
  constexpr const char* function = "quantized_linear";
  check_quantized_linear(x, weight, weight_scale, bias);
  check_byte_grid(function, "input", x, input_scale, input_zero_point, qmin, qmax);
  check_output_grid(function, x, output_scale, output_zero_point, output_qmin, output_qmax);
  const ByteNumbers input(function, "input", input_scale, input_zero_point, qmin, qmax);
  const auto output = output_numbers(function, output_scale, output_zero_point, output_qmin, output_qmax);
  if (!runs_on_onednn()) {
    return quantized_linear_anywhere(x, weight, weight_scale, bias, input_scale, input_zero_point, qmin, qmax, relu,
                                     output_scale, output_zero_point, output_qmin, output_qmax);
  }
  if (x.numel() == 0) {
    auto sizes = x.sizes().vec();
    sizes.back() = weight.size(0);
    return at::empty(sizes, x.options().dtype(output.has_value() ? at::kByte : at::kFloat));
  }
  const auto scales = per_channel_scale(function, weight_scale, weight.size(0));
  const auto q = to_bytes(x, input).contiguous();
  const auto packed = packed_weight(weight, {}, {}, [&] { return onednn::pack_linear(weight); });
  const auto y = onednn::linear(q, input.scale, input.zero(), packed, scales, optional_contiguous(bias),
                                relu && !output.has_value());
  return finish(y, relu, output);
}

at::Tensor quantized_conv_cpu(const at::Tensor& x, const at::Tensor& weight, const at::Tensor& weight_scale,
                              const OptionalTensor& bias, const at::Tensor& input_scale,
                              const at::Tensor& input_zero_point, int64_t qmin, int64_t qmax, at::IntArrayRef stride,
                              at::IntArrayRef padding, at::IntArrayRef dilation, int64_t groups, bool relu,
                              const OptionalTensor& output_scale, const OptionalTensor& output_zero_point,
                              int64_t output_qmin, int64_t output_qmax) {
  constexpr const char* function = "quantized_conv";
  const auto sizes = check_quantized_conv(x, weight, weight_scale, bias, stride, padding, dilation, groups);
  check_byte_grid(function, "input", x, input_scale, input_zero_point, qmin, qmax);
  check_output_grid(function, x, output_scale, output_zero_point, output_qmin, output_qmax);
  const ByteNumbers input(function, "input", input_scale, input_zero_point, qmin, qmax);
  const auto output = output_numbers(function, output_scale, output_zero_point, output_qmin, output_qmax);
  const auto dims = weight.dim() - 2;
  const Sides sides(function, padding, stride.size());
  auto symmetric = sides.before;
  if (!sides.symmetric()) {  // the image is padded beforehand
    symmetric.assign(symmetric.size(), 0);
  }
  if (!runs_on_onednn() || (dims == 3 && groups > 1) ||  // oneDNN's operator has no groups in three dimensions
      !onednn::convolves_exactly(weight, stride, symmetric, input.zero(), sizes.back().expect_int())) {
    return quantized_conv_anywhere(x, weight, weight_scale, bias, input_scale, input_zero_point, qmin, qmax, stride,
                                   padding, dilation, groups, relu, output_scale, output_zero_point, output_qmin,
                                   output_qmax);
  }
  const auto format = conv_format(x, weight);
  if (x.numel() == 0) {
    return at::empty(C10_AS_INTARRAYREF_SLOW(sizes), x.options().dtype(output.has_value() ? at::kByte : at::kFloat),
                     format);
  }
  auto q = onednn::with_height(to_bytes(x, input));
  if (!sides.symmetric()) {
    q = at::constant_pad_nd(q, sides.reversed(), input.zero());
  }
  const auto channels_last = dims == 3 ? at::MemoryFormat::ChannelsLast3d : at::MemoryFormat::ChannelsLast;
  q = q.contiguous(channels_last);
  const onednn::Movement movement(function, dims, stride, symmetric, dilation, groups);
  const auto scales = per_channel_scale(function, weight_scale, weight.size(0));
  std::vector<int64_t> how = {input.zero() == 0 ? 0 : 1, groups};
  for (const auto& values : {stride, at::IntArrayRef(symmetric), dilation}) {
    how.insert(how.end(), values.begin(), values.end());
  }
  const auto packed = packed_weight(weight, how, q.sizes().slice(2), [&] {
    // One scale stands for all while packing: each one would be read.
    return onednn::pack_conv(weight.contiguous(), scales.narrow(0, 0, 1), movement, q.sizes(), input.zero());
  });
  auto y = onednn::conv(q, input.scale, input.zero(), packed, scales, optional_contiguous(bias), movement,
                        relu && !output.has_value());
  y = finish(y, relu, output);
  return (dims == 1 ? y.squeeze(2) : y).contiguous(format);
}

at::Tensor quantized_add_cpu(const at::Tensor& a, const at::Tensor& b, const at::Tensor& a_scale,
                             const at::Tensor& a_zero_point, int64_t a_qmin, int64_t a_qmax, const at::Tensor& b_scale,
                             const at::Tensor& b_zero_point, int64_t b_qmin, int64_t b_qmax, bool relu,
                             const OptionalTensor& output_scale, const OptionalTensor& output_zero_point,
                             int64_t output_qmin, int64_t output_qmax) {
  constexpr const char* function = "quantized_add";
  check_quantized_add(a, b);
  check_byte_grid(function, "a", a, a_scale, a_zero_point, a_qmin, a_qmax);
  check_byte_grid(function, "b", a, b_scale, b_zero_point, b_qmin, b_qmax);
  check_output_grid(function, a, output_scale, output_zero_point, output_qmin, output_qmax);
  const ByteNumbers a_numbers(function, "a", a_scale, a_zero_point, a_qmin, a_qmax);
  const ByteNumbers b_numbers(function, "b", b_scale, b_zero_point, b_qmin, b_qmax);
  const auto output = output_numbers(function, output_scale, output_zero_point, output_qmin, output_qmax);
  const auto format = sum_format(a, b);
  const auto sizes = at::infer_size(a.sizes(), b.sizes());
  const auto q_a = to_bytes(a, a_numbers).expand(sizes).contiguous(format);
  const auto q_b = to_bytes(b, b_numbers).expand(sizes).contiguous(format);
  auto y = empty_as(q_a, output.has_value() ? at::kByte : at::kFloat);
  const cpu::Terms terms{q_a.const_data_ptr<uint8_t>(),
                         q_b.const_data_ptr<uint8_t>(),
                         a_numbers.scale,
                         a_numbers.zero_point,
                         b_numbers.scale,
                         b_numbers.zero_point};
  if (output.has_value()) {
    const auto numbers = relu ? output->rectified() : *output;
    const auto grid = numbers.grid();
    auto* bytes = y.data_ptr<uint8_t>();
    parallel_words(y.numel(), [&](int64_t begin, int64_t end) {
      RAREFY_ISA_CALL(add_bytes_to_grid, terms, grid, bytes, begin, end);
    });
  } else {
    auto* sums = y.data_ptr<float>();
    parallel_words(y.numel(),
                   [&](int64_t begin, int64_t end) { RAREFY_ISA_CALL(add_bytes, terms, relu, sums, begin, end); });
  }
  return y;
}

/// What each byte of one grid becomes on another.
std::array<uint8_t, 256> byte_table(const ByteNumbers& from, const ByteNumbers& to) {
  std::array<float, 256> values{};
  for (size_t i = 0; i < values.size(); ++i) {
    values[i] = (static_cast<float>(i) - from.zero_point) * from.scale;
  }
  std::array<uint8_t, 256> table{};
  const auto grid = to.grid();
  const cpu::Layout layout{cpu::FloatType::f32, 1, 256};
  RAREFY_ISA_CALL(quantize, values.data(), table.data(), layout, grid, 0, 256);
  return table;
}

at::Tensor requantize_cpu(const at::Tensor& x, const at::Tensor& scale, const at::Tensor& zero_point, int64_t qmin,
                          int64_t qmax, const OptionalTensor& output_scale, const OptionalTensor& output_zero_point,
                          int64_t output_qmin, int64_t output_qmax) {
  constexpr const char* function = "requantize";
  check_values(function, "input", x);
  check_byte_grid(function, "input", x, scale, zero_point, qmin, qmax);
  check_output_grid(function, x, output_scale, output_zero_point, output_qmin, output_qmax);
  const ByteNumbers input(function, "input", scale, zero_point, qmin, qmax);
  const auto output = output_numbers(function, output_scale, output_zero_point, output_qmin, output_qmax);
  const auto q = to_bytes(x, input);
  if (!output.has_value()) {
    return dequantize(q, {input.scale}, static_cast<int32_t>(input.zero()), -1, at::kFloat);
  }
  if (*output == input) {
    return q.is_alias_of(x) ? q.clone() : q;
  }
  auto y = empty_as(q, at::kByte);
  const auto table = byte_table(input, *output);
  const auto* in = q.const_data_ptr<uint8_t>();
  auto* out = y.data_ptr<uint8_t>();
  parallel_words(q.numel(), [&](int64_t begin, int64_t end) {
    std::transform(in + begin, in + end, out + begin, [&](uint8_t byte) { return table[byte]; });
  });
  return y;
}

at::Tensor max_pool2d_bytes_cpu(const at::Tensor& x, at::IntArrayRef kernel_size, at::IntArrayRef stride,
                                at::IntArrayRef padding, at::IntArrayRef dilation, bool ceil_mode) {
  const auto sizes = check_max_pool2d(x, kernel_size, stride, padding, dilation, ceil_mode);
  const auto in = x.contiguous(at::MemoryFormat::ChannelsLast);
  auto out = at::empty(C10_AS_INTARRAYREF_SLOW(sizes), x.options(), at::MemoryFormat::ChannelsLast);
  cpu::Windows windows{x.size(1), x.size(2), x.size(3), out.size(2), out.size(3), {}, {}, {}, {}};
  for (size_t i = 0; i < 2; ++i) {
    windows.kernel[i] = kernel_size[i];
    windows.stride[i] = stride[i];
    windows.padding[i] = padding[i];
    windows.dilation[i] = dilation[i];
  }
  const auto* bytes = in.const_data_ptr<uint8_t>();
  auto* largest = out.data_ptr<uint8_t>();
  const int64_t row =
      out.size(3) * out.size(1) * std::min(kernel_size[0], x.size(2)) * std::min(kernel_size[1], x.size(3));
  at::parallel_for(
      0, out.size(0) * out.size(2), std::max<int64_t>(1, kGrain / (row + 1)),
      [&](int64_t begin, int64_t end) { RAREFY_ISA_CALL(max_pool_bytes, bytes, largest, windows, begin, end); });
  return out.contiguous(x.suggest_memory_format());
}

}  // namespace

TORCH_LIBRARY_IMPL(rarefy, CPU, m) {
  m.impl("quantized_linear", &quantized_linear_cpu);
  m.impl("quantized_conv", &quantized_conv_cpu);
  m.impl("quantized_add", &quantized_add_cpu);
  m.impl("requantize", &requantize_cpu);
  m.impl("max_pool2d_bytes", &max_pool2d_bytes_cpu);
}

}  // namespace rarefy::ops
