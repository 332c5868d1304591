// The argument rules of integer inference, applied by every kernel and before anything is computed.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/core/MemoryFormat.h>
#include <c10/util/Exception.h>

#include <cstdint>
#include <limits>
#include <optional>
#include <vector>

#include "ops/integer_checks.h"

namespace rarefy::ops {

inline void check_values(const char* function, const char* name, const at::Tensor& x) {
  const auto type = x.scalar_type();
  TORCH_CHECK_TYPE(
      type == at::kFloat || type == at::kDouble || type == at::kBFloat16 || type == at::kHalf || type == at::kByte, "[",
      function, "] ", name, " must be floating point, or uint8 on its grid, got ", type);
}

inline void check_byte_grid(const char* function, const char* name, const at::Tensor& x, const at::Tensor& scale,
                            const at::Tensor& zero_point, int64_t qmin, int64_t qmax) {
  TORCH_CHECK_TYPE(scale.scalar_type() == at::kFloat && zero_point.scalar_type() == at::kInt, "[", function, "] ", name,
                   "_scale must be float32 and ", name, "_zero_point int32, got ", scale.scalar_type(), " and ",
                   zero_point.scalar_type());
  TORCH_CHECK_VALUE(scale.sym_numel() == 1 && zero_point.sym_numel() == 1, "[", function, "] ", name, "_scale and ",
                    name, "_zero_point must have 1 element, got ", scale.sym_numel(), " and ", zero_point.sym_numel());
  TORCH_CHECK_VALUE(qmin < qmax && ((qmin >= -128 && qmax <= 127) || (qmin >= 0 && qmax <= 255)), "[", function, "] ",
                    name, " range must be inside [-128, 127] or [0, 255], got [", qmin, ", ", qmax, "]");
  check_device(function, x, scale, name);
  check_device(function, x, zero_point, name);
}

/// An output grid is there as a whole or not at all. Returns whether it is.
inline bool check_output_grid(const char* function, const at::Tensor& x, const std::optional<at::Tensor>& scale,
                              const std::optional<at::Tensor>& zero_point, int64_t qmin, int64_t qmax) {
  TORCH_CHECK_VALUE(scale.has_value() == zero_point.has_value(), "[", function,
                    "] output_scale and output_zero_point must be given together, got only output_",
                    scale.has_value() ? "scale" : "zero_point");
  if (scale.has_value()) {
    check_byte_grid(function, "output", x, *scale, *zero_point, qmin, qmax);
  }
  return scale.has_value();
}

inline void check_weight(const char* function, const at::Tensor& x, const at::Tensor& weight,
                         const at::Tensor& weight_scale, const std::optional<at::Tensor>& bias) {
  TORCH_CHECK_TYPE(weight.scalar_type() == at::kChar, "[", function, "] weight must be int8, got ",
                   weight.scalar_type());
  const auto out = weight.sym_size(0);
  TORCH_CHECK_TYPE(weight_scale.scalar_type() == at::kFloat, "[", function, "] weight_scale must be float32, got ",
                   weight_scale.scalar_type());
  TORCH_CHECK_VALUE(weight_scale.dim() <= 1 && (weight_scale.sym_numel() == 1 || weight_scale.sym_numel() == out), "[",
                    function, "] weight_scale must have 1 or ", out, " elements, got shape ", weight_scale.sym_sizes());
  if (bias.has_value()) {
    TORCH_CHECK_TYPE(bias->scalar_type() == at::kFloat, "[", function, "] bias must be float32, got ",
                     bias->scalar_type());
  }
  check_bias(function, x, bias, out);
  check_device(function, x, weight, "weight");
  check_device(function, x, weight_scale, "weight_scale");
}

inline void check_quantized_linear(const at::Tensor& x, const at::Tensor& weight, const at::Tensor& weight_scale,
                                   const std::optional<at::Tensor>& bias) {
  constexpr const char* function = "quantized_linear";
  check_values(function, "input", x);
  TORCH_CHECK_VALUE(weight.dim() == 2 && weight.sym_numel() > 0, "[", function,
                    "] weight must have 2 dimensions and no empty one, got shape ", weight.sym_sizes());
  check_weight(function, x, weight, weight_scale, bias);
  TORCH_CHECK_VALUE(x.dim() >= 1 && x.sym_size(-1) == weight.sym_size(1), "[", function, "] input must have ",
                    weight.sym_size(1), " features in its last dimension, got shape ", x.sym_sizes());
  check_sum_length(function, weight.sym_size(1));
}

/// Sizes of windows and steps fit 32 bits, in which oneDNN counts; no product of two of them overflows.
inline void check_window_numbers(const char* function, at::IntArrayRef numbers) {
  for (const auto number : numbers) {
    TORCH_CHECK_VALUE(number <= std::numeric_limits<int32_t>::max(), "[", function,
                      "] sizes of windows, strides, padding and dilation must fit 32 bits, got ", number);
  }
}

/// Padding before and after every dimension, of one value for each dimension or two.
struct Sides {
  std::vector<int64_t> before, after;

  Sides(const char* function, at::IntArrayRef padding, size_t dims) {
    TORCH_CHECK_VALUE(padding.size() == dims || padding.size() == 2 * dims, "[", function, "] padding must have ", dims,
                      " or ", 2 * dims, " values, got ", padding.size());
    const size_t step = padding.size() == dims ? 1 : 2;
    for (size_t i = 0; i < dims; ++i) {
      before.push_back(padding[i * step]);
      after.push_back(padding[i * step + step - 1]);
    }
  }
  bool symmetric() const { return before == after; }
  /// As at::constant_pad_nd takes it: the last dimension first.
  std::vector<int64_t> reversed() const {
    std::vector<int64_t> out;
    for (size_t i = before.size(); i-- > 0;) {
      out.push_back(before[i]);
      out.push_back(after[i]);
    }
    return out;
  }
};

/// Returns the sizes of the result.
inline c10::SymDimVector check_quantized_conv(const at::Tensor& x, const at::Tensor& weight,
                                              const at::Tensor& weight_scale, const std::optional<at::Tensor>& bias,
                                              at::IntArrayRef stride, at::IntArrayRef padding, at::IntArrayRef dilation,
                                              int64_t groups) {
  constexpr const char* function = "quantized_conv";
  check_values(function, "input", x);
  TORCH_CHECK_VALUE(weight.dim() >= 3 && weight.dim() <= 5 && weight.sym_numel() > 0, "[", function,
                    "] weight must have 3 to 5 dimensions and no empty one, got shape ", weight.sym_sizes());
  check_weight(function, x, weight, weight_scale, bias);
  TORCH_CHECK_VALUE(groups > 0 && weight.sym_size(0) % groups == 0, "[", function, "] groups must divide ",
                    weight.sym_size(0), " output channels, got ", groups);
  TORCH_CHECK_VALUE(x.dim() == weight.dim() && x.sym_size(1) == weight.sym_size(1) * groups, "[", function,
                    "] input must have ", weight.dim(), " dimensions and ", weight.sym_size(1) * groups,
                    " channels, got shape ", x.sym_sizes());
  const auto dims = static_cast<size_t>(weight.dim() - 2);
  TORCH_CHECK_VALUE(stride.size() == dims && dilation.size() == dims, "[", function, "] stride and dilation must have ",
                    dims, " values, got ", stride.size(), " and ", dilation.size());
  for (const auto& numbers : {stride, padding, dilation}) {
    check_window_numbers(function, numbers);
  }
  const Sides sides(function, padding, dims);
  c10::SymDimVector sizes = {x.sym_size(0), weight.sym_size(0)};
  c10::SymInt products = weight.sym_size(1);
  for (size_t i = 0; i < dims; ++i) {
    const auto d = static_cast<int64_t>(i) + 2;
    TORCH_CHECK_VALUE(stride[i] > 0 && dilation[i] > 0 && sides.before[i] >= 0 && sides.after[i] >= 0, "[", function,
                      "] stride and dilation must be positive and padding not negative, got ", stride, ", ", dilation,
                      " and ", padding);
    const auto window = dilation[i] * (weight.sym_size(d) - 1) + 1;
    const auto padded = x.sym_size(d) + sides.before[i] + sides.after[i];
    TORCH_CHECK_VALUE(padded >= window, "[", function, "] the padded input must hold a window of ", window,
                      " along axis ", d, ", got ", padded);
    sizes.push_back((padded - window) / stride[i] + 1);
    products = products * weight.sym_size(d);
  }
  check_sum_length(function, products);
  return sizes;
}

inline void check_quantized_add(const at::Tensor& a, const at::Tensor& b) {
  constexpr const char* function = "quantized_add";
  check_values(function, "a", a);
  check_values(function, "b", b);
  check_device(function, a, b, "b");
}

/// Returns the sizes of the result.
inline c10::SymDimVector check_max_pool2d(const at::Tensor& x, at::IntArrayRef kernel_size, at::IntArrayRef stride,
                                          at::IntArrayRef padding, at::IntArrayRef dilation, bool ceil_mode) {
  constexpr const char* function = "max_pool2d_bytes";
  TORCH_CHECK_TYPE(x.scalar_type() == at::kByte, "[", function, "] input must be uint8, got ", x.scalar_type());
  TORCH_CHECK_VALUE(
      x.dim() == 4 && kernel_size.size() == 2 && stride.size() == 2 && padding.size() == 2 && dilation.size() == 2, "[",
      function, "] input must have 4 dimensions and kernel_size, stride, padding and dilation 2 values, ", "got shape ",
      x.sym_sizes());
  for (const auto& numbers : {kernel_size, stride, padding, dilation}) {
    check_window_numbers(function, numbers);
  }
  c10::SymDimVector sizes = {x.sym_size(0), x.sym_size(1)};
  for (size_t i = 0; i < 2; ++i) {
    TORCH_CHECK_VALUE(
        kernel_size[i] > 0 && stride[i] > 0 && dilation[i] > 0 && padding[i] >= 0 && 2 * padding[i] <= kernel_size[i],
        "[", function, "] kernel_size, stride and dilation must be positive and padding at most half of ",
        "the kernel's size, got ", kernel_size, ", ", stride, ", ", dilation, " and ", padding);
    const auto in = x.sym_size(static_cast<int64_t>(i) + 2);
    const auto room = in + 2 * padding[i] - dilation[i] * (kernel_size[i] - 1) - 1;
    TORCH_CHECK_VALUE(room >= 0, "[", function, "] the padded input must hold a window along axis ", i + 2, ", got ",
                      in, " values");
    auto out = (room + (ceil_mode ? stride[i] - 1 : 0)) / stride[i] + 1;
    if (ceil_mode &&
        (out - 1) * stride[i] >= in + padding[i]) {  // a window begins inside the input or its padding before
      out = out - 1;
    }
    sizes.push_back(out);
  }
  return sizes;
}

/// The layout of a sum: that of the tensor with more dimensions, the first of two.
inline at::MemoryFormat sum_format(const at::Tensor& a, const at::Tensor& b) {
  return a.dim() >= b.dim() ? a.suggest_memory_format() : b.suggest_memory_format();
}

/// The layout of a convolution's result: channels-last where input or weight is, as torch's convolution has it.
inline at::MemoryFormat conv_format(const at::Tensor& x, const at::Tensor& weight) {
  const auto format = x.suggest_memory_format();
  return format == at::MemoryFormat::Contiguous ? weight.suggest_memory_format() : format;
}

}  // namespace rarefy::ops
