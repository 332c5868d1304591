#include <ATen/Parallel.h>
#include <ATen/ops/_int_mm.h>
#include <ATen/ops/bitwise_xor.h>
#include <ATen/ops/convolution_backward.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/ones.h>
#include <ATen/ops/zeros.h>
#include <ATen/ops/zeros_like.h>
#include <rarefy/ops/fake_quantize.h>
#include <rarefy/ops/integer.h>
#include <torch/library.h>

#include <atomic>
#include <cmath>
#include <limits>
#include <vector>

#include "ops/allocate.h"
#include "ops/cpu/dense.h"
#include "ops/cpu/fake_quantize_kernel.h"
#include "ops/cpu/gradient_matmul.h"
#include "ops/cpu/im2col.h"
#include "ops/cpu/integer_simd.h"
#include "ops/cpu/onednn.h"
#include "ops/fake_quantize_checks.h"
#include "ops/integer_ops.h"

namespace rarefy::ops {
namespace {

cpu::FloatType float_type(at::ScalarType type) {
  return type == at::kBFloat16 ? cpu::FloatType::bf16
         : type == at::kHalf   ? cpu::FloatType::f16
                               : cpu::FloatType::f32;
}

std::vector<float> floats(const at::Tensor& values) {
  const auto flat = values.to(at::kFloat).contiguous();
  return {flat.const_data_ptr<float>(), flat.const_data_ptr<float>() + flat.numel()};
}

/// `value` for each of n channels, or the n values themselves.
std::vector<float> per_channel(const at::Tensor& values, int64_t n) {
  auto out = floats(values);
  if (out.size() == 1) {
    out.resize(static_cast<size_t>(n), out[0]);
  }
  return out;
}

// --- quantize_mask ----------------------------------------------------------------------------------------------------

std::tuple<at::Tensor, at::Tensor, at::Tensor> quantize_mask_cpu(const at::Tensor& x_, const at::Tensor& scale,
                                                                 const at::Tensor& zero_point,
                                                                 std::optional<int64_t> axis, int64_t qmin,
                                                                 int64_t qmax,
                                                                 const std::optional<at::Tensor>& multiplier) {
  constexpr const char* function = "quantize_mask";
  const int64_t resolved = check_fake_quantize(function, x_, scale, zero_point, axis, qmin, qmax);
  check_quantized_type(function, qmin, qmax);
  // float64 has no integer execution of its own: its integers are those of the value rounded to float32.
  const auto x = dense(x_.scalar_type() == at::kDouble ? x_.to(at::kFloat) : x_);
  const auto scales = floats(scale);
  const auto zeros = floats(zero_point);
  for (size_t i = 0; i < scales.size(); ++i) {
    TORCH_CHECK_VALUE(std::isfinite(scales[i]) && scales[i] > 0, "[", function,
                      "] scale must be finite and positive, got ", scales[i], " at index ", i);
  }
  std::vector<float> multipliers;
  if (multiplier.has_value()) {
    check_per_axis(function, x, resolved, *multiplier, "multiplier");
    multipliers = floats(*multiplier);
  }
  auto q = empty_for(x, qmin < 0 ? at::kChar : at::kByte);
  auto mask = empty_cached({mask_bytes(x.numel())}, at::kByte);
  const auto layout = layout_of(x, resolved);
  const cpu::Grid grid{scales.data(), zeros.data(), static_cast<float>(qmin), static_cast<float>(qmax)};
  const void* values = x.const_data_ptr();
  auto* bytes = static_cast<uint8_t*>(q.data_ptr());
  auto* bits = mask.data_ptr<uint8_t>();
  std::atomic<bool> is_number{true};
  parallel_words(x.numel(), [&](int64_t begin, int64_t end) {
    if (!RAREFY_ISA_CALL(quantize_mask, values, bytes, bits, layout, grid,
                         multipliers.empty() ? nullptr : multipliers.data(), begin, end)) {
      is_number.store(false, std::memory_order_relaxed);
    }
  });
  auto used = scale.to(at::kFloat, /*non_blocking=*/false, /*copy=*/true);
  if (!is_number.load()) {
    used.fill_(std::numeric_limits<float>::quiet_NaN());
  }
  return {q, mask, used};
}

at::Tensor dequantize(const at::Tensor& q, const at::Tensor& scale, const at::Tensor& zero_point, int64_t axis,
                      at::ScalarType type) {
  const auto layout_q = layout_of(q, axis);
  const cpu::Layout layout{float_type(type), layout_q.channels, layout_q.inner};
  auto y = empty_for(q, type);
  const auto scales = per_channel(scale, layout.channels);
  const auto zeros = per_channel(zero_point, layout.channels);
  const auto* bytes = static_cast<const uint8_t*>(q.const_data_ptr());
  void* out = y.data_ptr();
  const bool is_signed = q.scalar_type() == at::kChar;
  parallel_words(q.numel(), [&](int64_t begin, int64_t end) {
    RAREFY_ISA_CALL(dequantize, bytes, is_signed, out, layout, scales.data(), zeros.data(), begin, end);
  });
  return y;
}

/// The integers of the weight as floats: exact, also in bfloat16.
at::Tensor weight_integers(const at::Tensor& q_w, at::ScalarType type) {
  static const auto one = at::ones({1}), zero = at::zeros({1});
  return dequantize(q_w, one, zero, -1, type);
}

// --- Forward ----------------------------------------------------------------------------------------------------------

/// Everything that turns a row of sums into results.
struct Finish {
  std::vector<int32_t> offset;
  std::vector<float> scale;
  std::vector<float> bias;

  Finish(const at::Tensor& rows /* int8 [out, in], contiguous */, const at::Tensor& x_scale,
         const at::Tensor& x_zero_point, const at::Tensor& w_scale, const std::optional<at::Tensor>& bias_)
      : offset(static_cast<size_t>(rows.size(0))), scale(per_channel(w_scale, rows.size(0))) {
    const float s = x_scale.item<float>();
    for (auto& value : scale) {
      value = s * value;
    }
    if (bias_.has_value()) {
      bias = floats(*bias_);
    }
    const int32_t zero_point = x_zero_point.item<int32_t>();
    if (zero_point == 0) {
      return;
    }
    const auto* weight = rows.const_data_ptr<int8_t>();
    at::parallel_for(0, rows.size(0), std::max<int64_t>(1, kGrain / (rows.size(1) + 1)),
                     [&](int64_t begin, int64_t end) {
                       RAREFY_ISA_CALL(sum_bytes, weight, rows.size(1), offset.data(), begin, end);
                     });
    for (auto& value : offset) {
      value *= zero_point;
    }
  }

  /// sums: int32 [M, out], whose memory the result takes over where it can.
  std::tuple<at::Tensor, at::Tensor> apply(const at::Tensor& sums, bool relu, at::ScalarType dtype) const {
    at::Tensor y = dtype == at::kFloat ? sums.view(at::kFloat) : empty_cached(sums.sizes(), dtype);
    at::Tensor mask = empty_cached({relu ? mask_bytes(sums.numel()) : 0}, at::kByte);
    const cpu::Epilogue epilogue{sums.size(1), offset.data(), scale.data(), bias.empty() ? nullptr : bias.data(), relu};
    const auto* in = sums.const_data_ptr<int32_t>();
    void* out = y.data_ptr();
    uint8_t* bits = relu ? mask.data_ptr<uint8_t>() : nullptr;
    const auto type = float_type(dtype);
    parallel_words(sums.numel(), [&](int64_t begin, int64_t end) {
      RAREFY_ISA_CALL(finish_sums, in, out, type, bits, epilogue, begin, end);
    });
    return {y, mask};
  }
};

void check_bytes(const char* function, const at::Tensor& q_x, const at::Tensor& q_w) {
  TORCH_CHECK_TYPE(q_x.scalar_type() == at::kByte || q_x.scalar_type() == at::kChar, "[", function,
                   "] q_x must be uint8 or int8, got ", q_x.scalar_type());
  TORCH_CHECK_TYPE(q_w.scalar_type() == at::kChar, "[", function, "] q_w must be int8, got ", q_w.scalar_type());
}

std::tuple<at::Tensor, at::Tensor> integer_linear_forward_cpu(const at::Tensor& q_x, const at::Tensor& q_w,
                                                              const at::Tensor& x_scale,
                                                              const at::Tensor& x_zero_point, const at::Tensor& w_scale,
                                                              const std::optional<at::Tensor>& bias, bool transposed,
                                                              bool relu, at::ScalarType dtype) {
  check_bytes("integer_linear", q_x, q_w);
  const int64_t out = q_w.size(transposed ? 1 : 0);
  const auto rows = transposed ? q_w.t().contiguous() : q_w.contiguous();
  if (q_x.numel() == 0) {
    return {at::zeros({q_x.size(0), out}, q_x.options().dtype(dtype)), at::empty({0}, q_x.options().dtype(at::kByte))};
  }
  const Finish finish(rows, x_scale, x_zero_point, w_scale, bias);
  return finish.apply(at::_int_mm(q_x, rows.t()), relu, dtype);
}

/// Whether the convolution becomes one matrix product. Otherwise oneDNN convolves, which wants the weight repacked: at
/// every step, as the weight has changed. That pays where the weight is small beside the image.
bool runs_as_matmul(const ConvGeometry& g, int64_t out_channels, int64_t groups) {
  return groups == 1 && (g.is_pointwise() || 2 * out_channels >= g.positions() || g.in[0] > 1 || g.kernel[0] > 1);
}

at::MemoryFormat channels_last(int64_t dimensions) {
  return dimensions == 4   ? at::MemoryFormat::ChannelsLast
         : dimensions == 5 ? at::MemoryFormat::ChannelsLast3d
                           : at::MemoryFormat::Contiguous;
}

/// [out, kernel..., in] from a weight in any layout.
at::Tensor weight_rows(const at::Tensor& q_w) {
  const auto last = q_w.dim() == 3 ? q_w.transpose(1, 2) : q_w.contiguous(channels_last(q_w.dim())).movedim(1, -1);
  return last.reshape({q_w.size(0), -1});
}

/// Bytes or floats [N, C, spatial...] whose memory is [N, spatial..., C].
at::Tensor to_channels_last(const at::Tensor& x) {
  if (x.dim() == 3) {
    return x.transpose(1, 2).contiguous().transpose(1, 2);
  }
  return x.contiguous(channels_last(x.dim()));
}

/// A one-dimensional convolution as a two-dimensional one of height 1, without a copy.
at::Tensor with_height(const at::Tensor& x) { return x.dim() == 3 ? x.unsqueeze(2) : x; }
std::vector<int64_t> with_height(at::IntArrayRef values, int64_t front) {
  auto out = values.vec();
  if (out.size() == 1) {
    out.insert(out.begin(), front);
  }
  return out;
}

/// oneDNN's int8 convolution. Its activations are uint8; float32 out, [N, out, h, w] channels-last.
at::Tensor convolve_onednn(const at::Tensor& q_x_, const at::Tensor& q_w_, const at::Tensor& x_scale,
                           const at::Tensor& x_zero_point, const at::Tensor& w_scale,
                           const std::optional<at::Tensor>& bias, at::IntArrayRef stride_, at::IntArrayRef padding_,
                           at::IntArrayRef dilation_, int64_t groups, bool relu) {
  using Scalars = torch::List<std::optional<c10::Scalar>>;
  using Prepack = at::Tensor(at::Tensor, at::Tensor, double, int64_t, torch::List<int64_t>, torch::List<int64_t>,
                             torch::List<int64_t>, int64_t, std::optional<torch::List<int64_t>>);
  using Convolve = at::Tensor(at::Tensor, double, int64_t, at::Tensor, at::Tensor, at::Tensor,
                              std::optional<at::Tensor>, torch::List<int64_t>, torch::List<int64_t>,
                              torch::List<int64_t>, int64_t, double, int64_t, std::optional<c10::ScalarType>,
                              std::string_view, Scalars, std::optional<std::string_view>);
  static const auto prepack = onednn<Prepack>("onednn::qconv_prepack");
  static const auto convolve = onednn<Convolve>("onednn::qconv_pointwise");
  const auto q_x = with_height(q_x_);
  const auto q_w = with_height(q_w_);
  const torch::List<int64_t> stride(with_height(stride_, 1)), padding(with_height(padding_, 0)),
      dilation(with_height(dilation_, 1)), size(q_x.sizes());
  const bool is_signed = q_x.scalar_type() == at::kChar;
  const auto bytes = is_signed ? at::bitwise_xor(q_x, -128).view(at::kByte) : q_x;
  const int64_t zero_point = x_zero_point.item<int64_t>() + (is_signed ? 128 : 0);
  const double s = x_scale.item<double>();
  // The packed layout does not depend on the scales' values; one of them saves reading every one.
  static const auto one = at::ones({1});
  const auto packed = prepack.call(q_w, w_scale.numel() == 1 ? w_scale : one, 1.0, zero_point, stride, padding,
                                   dilation, groups, size);
  const auto zeros = at::zeros({w_scale.numel()}, w_scale.options().dtype(at::kInt));
  auto y = convolve.call(bytes, s, zero_point, packed, w_scale, zeros, bias, stride, padding, dilation, groups, 1.0, 0,
                         at::kFloat, relu ? "relu" : "none", Scalars(), std::nullopt);
  return q_x_.dim() == 3 ? y.squeeze(2) : y;
}

std::tuple<at::Tensor, at::Tensor> integer_conv_forward_cpu(const at::Tensor& q_x_, const at::Tensor& q_w,
                                                            const at::Tensor& x_scale, const at::Tensor& x_zero_point,
                                                            const at::Tensor& w_scale,
                                                            const std::optional<at::Tensor>& bias,
                                                            at::IntArrayRef stride, at::IntArrayRef padding,
                                                            at::IntArrayRef dilation, int64_t groups, bool relu,
                                                            at::ScalarType dtype) {
  check_bytes("integer_conv", q_x_, q_w);
  const auto q_x = to_channels_last(q_x_);
  const auto sizes = conv_sizes(q_x.sizes(), q_w.sizes(), stride, padding, dilation);
  const ConvGeometry geometry(q_x.sizes(), q_w.sizes(), stride, padding, dilation);
  const auto spatial_last = [&](const at::Tensor& rows) {  // [positions, out] as [N, out, spatial...]
    auto shape = sizes;
    shape.erase(shape.begin() + 1);
    shape.push_back(sizes[1]);
    return rows.view(shape).movedim(-1, 1);
  };
  if (q_x.numel() == 0 || geometry.positions() == 0) {
    auto y = at::zeros({geometry.positions(), sizes[1]}, q_x.options().dtype(dtype));
    return {spatial_last(y), at::empty({0}, q_x.options().dtype(at::kByte))};
  }
  if (runs_as_matmul(geometry, q_w.size(0), groups)) {
    const auto rows = weight_rows(q_w);
    const auto columns =
        geometry.is_pointwise()
            ? (q_x.dim() == 3 ? q_x.transpose(1, 2) : q_x.movedim(1, -1)).reshape({geometry.positions(), q_x.size(1)})
            : im2col(q_x, geometry, static_cast<uint8_t>(x_zero_point.item<int64_t>()));
    const Finish finish(rows, x_scale, x_zero_point, w_scale, bias);
    auto [y, mask] = finish.apply(at::_int_mm(columns, rows.t()), relu, dtype);
    return {spatial_last(y), mask};
  }
  TORCH_CHECK_NOT_IMPLEMENTED(q_x.dim() < 5,
                              "[integer_conv] groups in three dimensions must execute simulated, got ", groups,
                              " groups");
  auto y = convolve_onednn(q_x, q_w, x_scale, x_zero_point, w_scale, bias, stride, padding, dilation, groups, relu);
  at::Tensor mask = at::empty({0}, q_x.options().dtype(at::kByte));
  if (relu) {
    mask = empty_cached({mask_bytes(y.numel())}, at::kByte);
    const float* values = y.const_data_ptr<float>();
    auto* bits = mask.data_ptr<uint8_t>();
    parallel_words(y.numel(), [&](int64_t begin, int64_t end) {
      RAREFY_ISA_CALL(positive_mask, values, bits, begin, end);
    });
  }
  return {dtype == at::kFloat ? y : y.to(dtype), mask};
}

// --- Backward ---------------------------------------------------------------------------------------------------------

/// grad [rows, columns] times a value per column, in bfloat16.
at::Tensor scale_to_bf16(const at::Tensor& grad, const std::vector<float>& scale) {
  auto out = empty_for(grad, at::kBFloat16);
  const void* in = grad.const_data_ptr();
  void* y = out.data_ptr();
  const auto type = float_type(grad.scalar_type());
  const auto columns = static_cast<int64_t>(scale.size());
  parallel_words(grad.numel(), [&](int64_t begin, int64_t end) {
    RAREFY_ISA_CALL(scale_to_bf16, in, type, y, columns, scale.data(), begin, end);
  });
  return out;
}

/// bfloat16 [rows, ...] times a value per row, in float32 and the same layout; rows are contiguous in memory.
at::Tensor scale_rows(const at::Tensor& x, const std::vector<float>& scale) {
  auto out = empty_for(x, at::kFloat);
  const int64_t columns = x.numel() / x.size(0);
  const void* in = x.const_data_ptr();
  float* y = out.data_ptr<float>();
  at::parallel_for(0, x.size(0), std::max<int64_t>(1, kGrain / (columns + 1)), [&](int64_t begin, int64_t end) {
    RAREFY_ISA_CALL(scale_rows_from_bf16, in, y, columns, scale.data(), begin, end);
  });
  return out;
}

/// What undoes, in the gradient of the weight, that grad was scaled by the weight's scale and x was left as integers.
std::vector<float> weight_gradient_scale(const std::vector<float>& w_scale, float x_scale) {
  auto out = w_scale;
  for (auto& value : out) {
    value = x_scale / value;
  }
  return out;
}

std::tuple<at::Tensor, at::Tensor> integer_linear_backward_cpu(const at::Tensor& grad_, const at::Tensor& q_x,
                                                               const at::Tensor& q_w, const at::Tensor& x_scale,
                                                               const at::Tensor& x_zero_point,
                                                               const at::Tensor& w_scale, bool transposed, bool bf16,
                                                               std::array<bool, 2> need) {
  const int64_t out = q_w.size(transposed ? 1 : 0);
  static const auto one = at::ones({1}), zero = at::zeros({1});
  at::Tensor gx = at::empty({0}), gw = at::empty({0});
  if (q_x.numel() == 0) {
    return {need[0] ? at::zeros(q_x.sizes()) : gx, need[1] ? at::zeros(q_w.sizes()) : gw};
  }
  if (bf16) {
    // Input and weight are whole numbers of at most 9 bits, exact in bfloat16; their scales go to the gradient and to the
    // results.
    const auto scales = per_channel(w_scale, out);
    const auto grad = scale_to_bf16(grad_.contiguous(), scales);
    if (need[0]) {
      const auto weight = weight_integers(q_w, at::kBFloat16);
      gx = at::mm(grad, transposed ? weight.t() : weight).to(at::kFloat);
    }
    if (need[1]) {
      const auto x = dequantize(q_x, one, x_zero_point, -1, at::kBFloat16);
      gw = scale_rows(at::mm(grad.t(), x), weight_gradient_scale(scales, x_scale.item<float>()));
      gw = transposed ? gw.t().contiguous() : gw;
    }
    return {gx, gw};
  }
  const auto grad = grad_.to(at::kFloat).contiguous();
  if (need[0]) {
    const auto weight = dequantize(q_w, w_scale, zero, w_scale.numel() == 1 ? -1 : transposed ? 1 : 0, at::kFloat);
    gx = matmul_transposed(grad, transposed ? weight : weight.t());
  }
  if (need[1]) {
    const auto x = dequantize(q_x, x_scale, x_zero_point, -1, at::kFloat);
    gw = transposed ? matmul_transposed(x.t(), grad.t()) : matmul_transposed(grad.t(), x.t());
  }
  return {gx, gw};
}

/// Whether the weight's gradient is one matrix product: oneDNN's kernel for it is slow where the image is small.
bool weight_gradient_as_matmul(const ConvGeometry& g, int64_t groups) {
  return groups == 1 && (g.is_pointwise() || g.out[0] * g.out[1] * g.out[2] <= 16);
}

at::Tensor like(const at::Tensor& gradient, const at::Tensor& layout) {
  if (gradient.strides() == layout.strides()) {
    return gradient;
  }
  return at::empty_like(layout, layout.options().dtype(at::kFloat)).copy_(gradient);
}

std::tuple<at::Tensor, at::Tensor> integer_conv_backward_cpu(const at::Tensor& grad_, const at::Tensor& q_x_,
                                                             const at::Tensor& q_w, const at::Tensor& x_scale,
                                                             const at::Tensor& x_zero_point, const at::Tensor& w_scale,
                                                             at::IntArrayRef stride, at::IntArrayRef padding,
                                                             at::IntArrayRef dilation, int64_t groups, bool bf16,
                                                             std::array<bool, 2> need) {
  const auto q_x = to_channels_last(q_x_);
  const ConvGeometry geometry(q_x.sizes(), q_w.sizes(), stride, padding, dilation);
  static const auto one = at::ones({1}), zero = at::zeros({1});
  at::Tensor gx = at::empty({0}), gw = at::empty({0});
  if (q_x.numel() == 0 || geometry.positions() == 0) {
    return {need[0] ? at::zeros_like(q_x_, at::kFloat) : gx, need[1] ? at::zeros_like(q_w, at::kFloat) : gw};
  }
  const auto type = bf16 ? at::kBFloat16 : at::kFloat;
  const auto scales = per_channel(w_scale, q_w.size(0));
  const auto x_factor = bf16 ? one : x_scale;  // exact integers in bfloat16; the scale comes afterwards
  auto grad = to_channels_last(grad_);
  grad = bf16 ? scale_to_bf16(grad, scales) : grad.to(at::kFloat);
  const bool matmul = need[1] && weight_gradient_as_matmul(geometry, groups);
  if (matmul) {
    const auto columns = geometry.is_pointwise()
                             ? (q_x.dim() == 3 ? q_x.transpose(1, 2) : q_x.movedim(1, -1))
                                   .reshape({geometry.positions(), q_x.size(1)})
                             : im2col(q_x, geometry, static_cast<uint8_t>(x_zero_point.item<int64_t>()));
    const auto x = dequantize(columns, x_factor, x_zero_point, -1, type);
    const auto rows = (grad.dim() == 3 ? grad.transpose(1, 2) : grad.movedim(1, -1)).reshape({geometry.positions(), -1});
    auto product = bf16 ? at::mm(rows.t(), x) : matmul_transposed(rows.t(), x.t());
    std::vector<int64_t> shape = q_w.sizes().vec();  // [out, kernel..., in]
    shape.erase(shape.begin() + 1);
    shape.push_back(q_w.size(1));
    gw = product.view(shape).movedim(-1, 1);
  }
  if (need[0] || (need[1] && !matmul)) {
    const auto weight =
        bf16 ? weight_integers(q_w, type) : dequantize(q_w, w_scale, zero, w_scale.numel() == 1 ? -1 : 0, type);
    const auto x = need[1] && !matmul ? dequantize(q_x, x_factor, x_zero_point, -1, type)
                                      : at::empty_like(q_x, q_x.options().dtype(type));
    const std::vector<int64_t> no_padding(stride.size(), 0);
    auto [input, kernel, bias] = at::convolution_backward(grad, x, weight, std::nullopt, stride, padding, dilation,
                                                          false, no_padding, groups, {need[0], need[1] && !matmul, false});
    gx = need[0] ? input : gx;
    gw = need[1] && !matmul ? kernel : gw;
  }
  if (need[0]) {
    gx = like(gx, q_x_);
  }
  if (need[1]) {
    if (bf16) {
      const bool rows_are_dense = gw.is_non_overlapping_and_dense() && gw.stride(0) * gw.size(0) == gw.numel();
      gw = scale_rows(rows_are_dense ? gw : gw.contiguous(), weight_gradient_scale(scales, x_scale.item<float>()));
    }
    gw = like(gw, q_w);
  }
  return {gx, gw};
}

at::Tensor integer_multiplier_backward_cpu(const at::Tensor& grad, const at::Tensor& mask, const at::Tensor& weight,
                                           const at::Tensor& q_w, const at::Tensor& scale,
                                           const at::Tensor& multiplier) {
  TORCH_CHECK_VALUE(grad.strides() == q_w.strides() && weight.strides() == q_w.strides(),
                    "[integer_multiplier_backward] grad, weight and q_w must have the same strides, got ",
                    grad.strides(), ", ", weight.strides(), " and ", q_w.strides());
  const int64_t channels = q_w.size(0);
  const int64_t n = q_w.numel() / channels;
  std::vector<float> with_weight(static_cast<size_t>(channels)), with_integers(with_weight);
  const auto weights = weight.to(at::kFloat);
  const auto dot = [&](const at::Tensor& gradient, std::vector<float>& first, std::vector<float>& second) {
    const float* g = gradient.const_data_ptr<float>();
    const float* w = weights.const_data_ptr<float>();
    const auto* q = q_w.const_data_ptr<int8_t>();
    at::parallel_for(0, channels, std::max<int64_t>(1, kGrain / (n + 1)), [&](int64_t begin, int64_t end) {
      RAREFY_ISA_CALL(dot_rows, g, w, q, n, first.data(), second.data(), begin, end);
    });
  };
  dot(grad, with_weight, with_integers);
  if (!is_all_ones(mask, grad.numel())) {
    std::vector<float> unused(with_weight);
    dot(fake_quantize_backward(grad, mask, grad.sym_strides()), with_weight, unused);
  }
  const auto scales = per_channel(scale, channels);
  const auto m = floats(multiplier);
  auto out = at::empty({channels}, grad.options());
  for (int64_t c = 0; c < channels; ++c) {
    const auto i = static_cast<size_t>(c);
    out.data_ptr<float>()[c] = (with_weight[i] - scales[i] * with_integers[i]) / m[i];
  }
  return out.to(multiplier.scalar_type());
}

/// Integers of the AVX512-VNNI and AVX-VNNI instructions are summed in 32 bits.
bool processor_has_dot_products() {
#if defined(__x86_64__)
  return __builtin_cpu_supports("avx512vnni") || __builtin_cpu_supports("avxvnni");
#else
  return false;
#endif
}

}  // namespace

bool has_exact_integer_products() {
  static const bool answer = processor_has_dot_products();
  return answer;
}

TORCH_LIBRARY_IMPL(rarefy, CPU, m) {
  m.impl("quantize_mask", &quantize_mask_cpu);
  m.impl("integer_linear_forward", &integer_linear_forward_cpu);
  m.impl("integer_linear_backward", &integer_linear_backward_cpu);
  m.impl("integer_conv_forward", &integer_conv_forward_cpu);
  m.impl("integer_conv_backward", &integer_conv_backward_cpu);
  m.impl("integer_multiplier_backward", &integer_multiplier_backward_cpu);
}

}  // namespace rarefy::ops
