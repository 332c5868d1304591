#include <ATen/ops/bitwise_xor.h>
#include <ATen/ops/constant_pad_nd.h>
#include <ATen/ops/convolution.h>
#include <ATen/ops/convolution_backward.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/full.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/zeros_like.h>
#include <rarefy/ops/fake_quantize.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "ops/allocate.h"
#include "ops/cpu/dense.h"
#include "ops/cpu/fake_quantize_kernel.h"
#include "ops/cpu/gradient_matmul.h"
#include "ops/cpu/im2col.h"
#include "ops/cpu/integer_kernel.h"
#include "ops/cpu/integer_simd.h"
#include "ops/cpu/onednn.h"
#include "ops/integer_checks.h"
#include "ops/integer_ops.h"

namespace rarefy::ops {
namespace {

/// Whether the convolution becomes matrix products. Otherwise oneDNN convolves, which wants the weight repacked: at every
/// step, as the weight has changed. That pays where the weight is small beside the image.
bool runs_as_matmul(const ConvGeometry& g, int64_t out_channels, int64_t groups) {
  return groups == 1 && (g.is_pointwise() || 2 * out_channels >= g.positions() || g.in[0] > 1 || g.kernel[0] > 1);
}

/// Whether the weight's gradient is one matrix product: oneDNN's kernel for it is slow where the image is small.
bool weight_gradient_as_matmul(const ConvGeometry& g, int64_t groups) {
  return groups == 1 && (g.is_pointwise() || g.out[0] * g.out[1] * g.out[2] <= 16);
}

/// Whether the input's gradient is one matrix product, whose patches are then added up: pays where the image is smallest.
bool input_gradient_as_matmul(const ConvGeometry& g, int64_t groups) {
  return groups == 1 && !g.is_pointwise() && g.out[0] * g.out[1] * g.out[2] <= 4;
}

at::MemoryFormat channels_last(int64_t dimensions) {
  return dimensions == 4 ? at::MemoryFormat::ChannelsLast : at::MemoryFormat::ChannelsLast3d;
}

/// Bytes or floats [N, C, spatial...] whose memory is [N, spatial..., C].
at::Tensor to_channels_last(const at::Tensor& x) {
  if (x.dim() == 3) {
    return x.transpose(1, 2).contiguous().transpose(1, 2);
  }
  return x.contiguous(channels_last(x.dim()));
}

/// [N, spatial..., C], a view.
at::Tensor with_channels_last(const at::Tensor& x) { return x.movedim(1, -1); }

/// [positions, C] of an image or a gradient in channels-last memory.
at::Tensor as_rows(const at::Tensor& x) { return with_channels_last(x).reshape({-1, x.size(1)}); }

/// [positions, C] as [N, C, spatial...], a view.
at::Tensor as_image(const at::Tensor& rows, const ConvGeometry& g, int64_t dimensions) {
  std::vector<int64_t> shape = {g.batch};
  for (int64_t d = 5 - dimensions; d < 3; ++d) {
    shape.push_back(g.out[static_cast<size_t>(d)]);
  }
  shape.push_back(rows.size(1));
  return rows.view(shape).movedim(-1, 1);
}

/// [out, kernel..., in] from a weight in any layout.
at::Tensor weight_rows(const at::Tensor& q_w) {
  return with_channels_last(q_w).reshape({q_w.size(0), -1}).contiguous();
}

/// int32 [positions, out]. The patches are written out for as many samples at a time as fit in kMostBytes.
at::Tensor multiply_patches(const at::Tensor& q_x, const at::Tensor& rows, const ConvGeometry& g, uint8_t fill) {
  if (g.is_pointwise()) {
    return multiply_bytes(as_rows(q_x), rows);
  }
  constexpr int64_t kMostBytes = int64_t{64} << 20;
  const int64_t positions = g.positions() / g.batch;
  const int64_t samples = std::clamp<int64_t>(kMostBytes / (positions * g.patch()), 1, g.batch);
  if (samples == g.batch) {
    return multiply_bytes(im2col(q_x, g, fill), rows);
  }
  auto sums = empty_cached({g.positions(), rows.size(0)}, at::kInt);
  for (int64_t n = 0; n < g.batch; n += samples) {
    auto part = g;
    part.batch = std::min(samples, g.batch - n);
    auto out = sums.narrow(0, n * positions, part.positions());
    multiply_bytes_into(out, im2col(q_x.narrow(0, n, part.batch), part, fill), rows);
  }
  return sums;
}

/// int32 [positions, out] of a convolution that oneDNN's int8 kernel fails at, through its floating-point one: the sums are
/// integers below 2^24, or are added in double precision, and are exact.
at::Tensor convolve_floats(const at::Tensor& q_x, const at::Tensor& q_w, const at::Tensor& x_zero_point,
                           at::IntArrayRef stride, at::IntArrayRef padding, at::IntArrayRef dilation, int64_t groups) {
  constexpr int64_t kLargestProduct = 255 * 128, kExact = int64_t{1} << 24;
  const auto type = q_w.numel() / q_w.size(0) * kLargestProduct <= kExact ? at::kFloat : at::kDouble;
  std::vector<int64_t> around;  // the last dimension first
  for (size_t d = padding.size(); d-- > 0;) {
    around.insert(around.end(), 2, padding[d]);
  }
  const auto x = at::constant_pad_nd(q_x, around, x_zero_point.item<int32_t>()).to(type);
  const std::vector<int64_t> none(stride.size(), 0);
  const auto sums = at::convolution(x, q_w.to(type), std::nullopt, stride, none, dilation, false, none, groups);
  return as_rows(sums.to(at::kInt)).contiguous();
}

/// oneDNN's int8 convolution: float32 [N, out, spatial...], channels-last.
at::Tensor convolve_onednn(const at::Tensor& q_x, const at::Tensor& q_w, const at::Tensor& x_scale,
                           const at::Tensor& x_zero_point, const at::Tensor& w_scale,
                           const std::optional<at::Tensor>& bias, const onednn::Movement& movement, bool relu) {
  const bool is_signed = q_x.scalar_type() == at::kChar;
  const auto image = onednn::with_height(is_signed ? at::bitwise_xor(q_x, -128).view(at::kByte) : q_x);
  const int64_t zero_point = x_zero_point.item<int32_t>() + (is_signed ? 128 : 0);
  const auto scale = w_scale.contiguous().view({-1});
  // One scale stands for all while packing: each one would be read.
  const auto packed = onednn::pack_conv(q_w, scale.narrow(0, 0, 1), movement, image.sizes(), zero_point);
  const auto float_bias = bias.has_value() ? std::optional(bias->to(at::kFloat).contiguous()) : std::nullopt;
  const auto y = onednn::conv(image, x_scale.item<double>(), zero_point, packed, scale, float_bias, movement, relu);
  return q_x.dim() == 3 ? y.squeeze(2) : y;
}

std::tuple<at::Tensor, at::Tensor> integer_conv_forward_cpu(
    const at::Tensor& q_x_, const at::Tensor& q_w, const at::Tensor& x_scale, const at::Tensor& x_zero_point,
    const at::Tensor& w_scale, const std::optional<at::Tensor>& bias, at::IntArrayRef stride, at::IntArrayRef padding,
    at::IntArrayRef dilation, int64_t groups, bool relu, at::ScalarType dtype) {
  constexpr const char* function = "integer_conv_forward";
  check_conv_bytes(function, q_x_, q_w, x_scale, x_zero_point, w_scale, stride, padding, dilation, groups);
  check_bias(function, q_x_, bias, q_w.size(0));
  check_result_type(function, dtype);
  const ConvGeometry geometry(q_x_.sizes(), q_w.sizes(), stride, padding, dilation);
  const auto options = q_x_.options();
  if (geometry.positions() == 0) {
    const auto y = at::empty({0, q_w.size(0)}, options.dtype(dtype));
    return {as_image(y, geometry, q_x_.dim()), at::empty({0}, options.dtype(at::kByte))};
  }
  const auto q_x = to_channels_last(q_x_);
  if (runs_as_matmul(geometry, q_w.size(0), groups)) {
    const auto rows = weight_rows(q_w);
    const Epilogue epilogue(rows, x_scale, x_zero_point, w_scale, bias);
    const auto fill = static_cast<uint8_t>(x_zero_point.item<int32_t>());
    auto [y, mask] = epilogue.apply(multiply_patches(q_x, rows, geometry, fill), relu, dtype);
    return {as_image(y, geometry, q_x.dim()), mask};
  }
  TORCH_CHECK_NOT_IMPLEMENTED(q_x.dim() < 5, "[integer_conv] groups in three dimensions must execute simulated, got ",
                              groups, " groups");
  if (std::isnan(x_scale.item<float>())) {  // oneDNN's ReLU would hide it
    auto y =
        at::full({geometry.positions(), q_w.size(0)}, std::numeric_limits<float>::quiet_NaN(), options.dtype(dtype));
    return {as_image(y, geometry, q_x.dim()),
            at::full({relu ? mask_bytes(y.numel()) : 0}, 0xff, options.dtype(at::kByte))};
  }
  const int64_t zero_byte = x_zero_point.item<int32_t>() + (q_x.scalar_type() == at::kChar ? 128 : 0);
  if (!onednn::convolves_exactly(q_w, stride, padding, zero_byte, geometry.out[2])) {
    const Epilogue epilogue(weight_rows(q_w), x_scale, x_zero_point, w_scale, bias);
    const auto sums = convolve_floats(q_x, q_w, x_zero_point, stride, padding, dilation, groups);
    auto [y, mask] = epilogue.apply(sums, relu, dtype);
    return {as_image(y, geometry, q_x.dim()), mask};
  }
  const onednn::Movement movement(function, q_x.dim() - 2, stride, padding, dilation, groups);
  const auto y = convolve_onednn(q_x, q_w, x_scale, x_zero_point, w_scale, bias, movement, relu);
  const auto mask = relu ? positive_mask(y) : at::empty({0}, options.dtype(at::kByte));
  return {dtype == at::kFloat ? y : y.to(dtype), mask};
}

/// The gradient in float32 with the strides of `layout`.
at::Tensor like(const at::Tensor& gradient, const at::Tensor& layout) {
  if (gradient.strides() == layout.strides()) {
    return gradient.to(at::kFloat);
  }
  return at::empty_like(layout, layout.options().dtype(at::kFloat)).copy_(gradient);
}

/// Whether filters lie one after the other in memory.
bool filters_in_order(const at::Tensor& weight) {
  return weight.is_non_overlapping_and_dense() &&
         (weight.size(0) == 1 || weight.stride(0) * weight.size(0) == weight.numel());
}

std::tuple<at::Tensor, at::Tensor> integer_conv_backward_cpu(const at::Tensor& grad_, const at::Tensor& q_x_,
                                                             const at::Tensor& q_w, const at::Tensor& x_scale,
                                                             const at::Tensor& x_zero_point, const at::Tensor& w_scale,
                                                             at::IntArrayRef stride, at::IntArrayRef padding,
                                                             at::IntArrayRef dilation, int64_t groups, bool bf16,
                                                             std::array<bool, 2> need) {
  constexpr const char* function = "integer_conv_backward";
  check_conv_bytes(function, q_x_, q_w, x_scale, x_zero_point, w_scale, stride, padding, dilation, groups);
  const ConvGeometry geometry(q_x_.sizes(), q_w.sizes(), stride, padding, dilation);
  c10::SymDimVector sizes = {q_x_.sym_size(0), q_w.sym_size(0)};
  for (int64_t d = 5 - q_x_.dim(); d < 3; ++d) {
    sizes.emplace_back(geometry.out[static_cast<size_t>(d)]);
  }
  check_gradient(function, grad_, sizes, q_x_);
  const auto options = q_x_.options().dtype(at::kFloat);
  at::Tensor gx = at::empty({0}, options), gw = at::empty({0}, options);
  if (geometry.positions() == 0) {
    return {need[0] ? at::zeros_like(q_x_, options) : gx, need[1] ? at::zeros_like(q_w, options) : gw};
  }
  const auto q_x = to_channels_last(q_x_);
  const auto type = bf16 ? at::kBFloat16 : at::kFloat;
  const auto scales = per_channel(w_scale, q_w.size(0));
  // bfloat16 holds the integers exactly; their scales go to the gradient and to the results.
  const auto x_factor = bf16 ? std::vector<float>{1.0f} : floats(x_scale);
  const auto zero_point = x_zero_point.item<int32_t>();
  auto grad = to_channels_last(bf16 && grad_.scalar_type() != at::kDouble ? grad_ : grad_.to(at::kFloat));
  grad = bf16 ? scale_to_bf16(grad, scales) : grad;
  const bool matmul = need[1] && weight_gradient_as_matmul(geometry, groups);
  if (matmul) {
    const auto columns =
        geometry.is_pointwise() ? as_rows(q_x) : im2col(q_x, geometry, static_cast<uint8_t>(zero_point));
    const auto x = dequantize(columns, x_factor, zero_point, -1, type);
    const auto rows = as_rows(grad);
    const auto product = bf16 ? at::mm(rows.t(), x) : matmul_transposed(rows.t(), x.t());
    auto shape = with_channels_last(q_w).sizes().vec();  // [out, kernel..., in]
    gw = product.view(shape).movedim(-1, 1);
  }
  const bool patches = need[0] && input_gradient_as_matmul(geometry, groups);
  if (patches) {
    const auto rows = weight_rows(q_w);
    const auto weight = bf16 ? dequantize(rows, {1.0f}, 0, -1, type) : dequantize(rows, floats(w_scale), 0, 0, type);
    const auto columns = bf16 ? at::mm(as_rows(grad), weight) : matmul_transposed(as_rows(grad), weight.t());
    gx = col2im(columns, geometry).view(with_channels_last(q_x).sizes()).movedim(-1, 1);
  }
  const std::array<bool, 2> rest = {need[0] && !patches, need[1] && !matmul};
  if (rest[0] || rest[1]) {
    const auto weight = bf16 ? dequantize(q_w, {1.0f}, 0, -1, type) : dequantize(q_w, floats(w_scale), 0, 0, type);
    const auto x = rest[1] ? dequantize(q_x, x_factor, zero_point, -1, type) : at::empty_like(q_x, options.dtype(type));
    const std::vector<int64_t> no_padding(stride.size(), 0);
    auto [input, kernel, bias] = at::convolution_backward(grad, x, weight, std::nullopt, stride, padding, dilation,
                                                          false, no_padding, groups, {rest[0], rest[1], false});
    gx = rest[0] ? input : gx;
    gw = rest[1] ? kernel : gw;
  }
  if (need[0]) {
    gx = like(gx, q_x_);
  }
  if (need[1]) {
    gw = bf16 ? scale_rows(filters_in_order(gw) ? gw : gw.contiguous(), weight_gradient_scale(scales, x_scale)) : gw;
    gw = like(gw, q_w);
  }
  return {gx, gw};
}

}  // namespace

TORCH_LIBRARY_IMPL(rarefy, CPU, m) {
  m.impl("integer_conv_forward", &integer_conv_forward_cpu);
  m.impl("integer_conv_backward", &integer_conv_backward_cpu);
}

}  // namespace rarefy::ops
