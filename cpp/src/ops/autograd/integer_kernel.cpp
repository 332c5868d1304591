#include <ATen/autocast_mode.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/sum.h>
#include <rarefy/ops/integer.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include <algorithm>
#include <utility>
#include <vector>

#include "ops/autograd/mask_gradient.h"
#include "ops/autograd/not_differentiable.h"
#include "ops/integer_checks.h"
#include "ops/integer_ops.h"

namespace rarefy::ops {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::Variable;
using torch::autograd::variable_list;

/// How far the bytes move to the type that the device's kernels multiply fastest: uint8 on the CPU, int8 elsewhere. The
/// zero point moves with them, so they mean the same numbers (docs/dev/numerics.md, "Relabelling").
int64_t relabelling(const at::Tensor& x, int64_t qmin) {
  if (x.is_cuda()) {
    return qmin >= 0 ? -128 : 0;
  }
  return qmin < 0 ? 128 : 0;
}

/// Integer products have no weight zero point. Its values are read only where that waits for no device and is not traced.
void check_no_zero_point(const char* function, const at::Tensor& w_zero_point) {
  TORCH_CHECK_TYPE(w_zero_point.scalar_type() == at::kInt, "[", function, "] w_zero_point must be int32, got ",
                   w_zero_point.scalar_type());
  if (!w_zero_point.is_cpu() || !is_plain(w_zero_point)) {
    return;
  }
  const auto values = w_zero_point.contiguous();
  const auto* begin = values.const_data_ptr<int32_t>();
  const auto* end = begin + values.numel();
  const auto* bad = std::find_if(begin, end, [](int32_t value) { return value != 0; });
  TORCH_CHECK_VALUE(bad == end, "[", function, "] w_zero_point must be 0, got ", *bad, " at index ", bad - begin);
}

void check_layer(const char* function, const at::Tensor& x, const at::Tensor& weight,
                 const std::optional<at::Tensor>& bias, const IntegerGrids& grids, const c10::SymInt& out_channels,
                 std::optional<at::ScalarType> dtype) {
  check_float(function, x, "input");
  check_float(function, weight, "weight");
  TORCH_CHECK_VALUE(weight.sym_numel() > 0, "[", function, "] weight must not be empty, got shape ",
                    weight.sym_sizes());
  check_device(function, x, weight, "weight");
  check_quantized_type(function, grids.x_qmin, grids.x_qmax);
  TORCH_CHECK_VALUE(grids.w_qmin >= -128 && grids.w_qmin < 0 && grids.w_qmax <= 127, "[", function,
                    "] the weight's range must be signed and fit int8, got [", grids.w_qmin, ", ", grids.w_qmax, "]");
  TORCH_CHECK_VALUE(grids.x_scale.sym_numel() == 1 && grids.x_zero_point.sym_numel() == 1, "[", function,
                    "] x_scale and x_zero_point must have 1 element, got ", grids.x_scale.sym_numel(), " and ",
                    grids.x_zero_point.sym_numel());
  for (const auto& [values, name] : {std::pair{&grids.w_scale, "w_scale"}, {&grids.w_zero_point, "w_zero_point"}}) {
    TORCH_CHECK_VALUE(values->dim() <= 1 && (values->sym_numel() == 1 || values->sym_numel() == out_channels), "[",
                      function, "] ", name, " must have 1 or ", out_channels, " elements, got shape ",
                      values->sym_sizes());
  }
  check_no_zero_point(function, grids.w_zero_point);
  check_bias(function, x, bias, out_channels);
  if (dtype.has_value()) {
    check_result_type(function, *dtype);
  }
}

at::ScalarType result_type(const at::Tensor& x, std::optional<at::ScalarType> dtype) {
  if (dtype.has_value()) {
    return *dtype;
  }
  const auto device = x.device().type();
  if (at::autocast::is_autocast_available(device) && at::autocast::is_autocast_enabled(device) &&
      x.scalar_type() != at::kDouble) {
    return at::autocast::get_autocast_dtype(device);
  }
  return x.scalar_type() == at::kDouble ? at::kFloat : x.scalar_type();
}

/// Bytes of x and of the weight, and what is needed to undo them.
struct Quantized {
  at::Tensor q_x, x_mask, x_scale, x_zero_point;
  at::Tensor q_w, w_mask, w_scale;
};

Quantized quantize_both(const at::Tensor& x, const at::Tensor& weight, const std::optional<at::Tensor>& multiplier,
                        const IntegerGrids& grids, int64_t w_axis) {
  Quantized out;
  const int64_t shift = relabelling(x, grids.x_qmin);
  // Copies: the state moves on with the next batch, and the backward pass needs what this one used.
  out.x_zero_point = grids.x_zero_point + shift;
  std::tie(out.q_x, out.x_mask, out.x_scale) =
      quantize_mask(x, grids.x_scale, out.x_zero_point, std::nullopt, grids.x_qmin + shift, grids.x_qmax + shift, {});
  const bool per_channel = grids.w_scale.sym_numel() > 1 || multiplier.has_value();
  const auto axis = per_channel ? std::optional(w_axis) : std::nullopt;
  const auto spread = [&](const at::Tensor& values) {
    return per_channel && values.sym_numel() == 1 ? values.expand_symint({weight.sym_size(w_axis)}).contiguous()
                                                  : values;
  };
  std::tie(out.q_w, out.w_mask, out.w_scale) = quantize_mask(weight, spread(grids.w_scale), spread(grids.w_zero_point),
                                                             axis, grids.w_qmin, grids.w_qmax, multiplier);
  if (multiplier.has_value()) {
    out.w_scale = out.w_scale / *multiplier;
  }
  return out;
}

at::Tensor channels_last(const at::Tensor& x) {
  if (x.dim() == 3) {
    return x.transpose(1, 2).contiguous().transpose(1, 2);
  }
  return x.contiguous(x.dim() == 4 ? at::MemoryFormat::ChannelsLast : at::MemoryFormat::ChannelsLast3d);
}

bool is_channels_last(const at::Tensor& x) {
  const auto format = x.suggest_memory_format();
  return format == at::MemoryFormat::ChannelsLast || format == at::MemoryFormat::ChannelsLast3d;
}

/// The weight itself where its filters lie one after the other in memory, else a copy.
at::Tensor dense_filters(const at::Tensor& weight) {
  const bool in_order = weight.is_non_overlapping_and_dense() &&
                        (weight.sym_size(0) == 1 || weight.sym_stride(0) * weight.sym_size(0) == weight.sym_numel());
  return in_order ? weight : weight.contiguous();
}

void check_first_derivative(const char* function) {
  TORCH_CHECK_NOT_IMPLEMENTED(!at::GradMode::is_enabled(), "[", function,
                              "] integer execution has no second derivative: use execution=\"simulated\"");
}

at::Tensor in_type(const at::Tensor& gradient, at::ScalarType type) {
  return gradient.defined() && gradient.scalar_type() != type ? gradient.to(type) : gradient;
}

// --- Linear -----------------------------------------------------------------------------------------------------------

at::Tensor rows_of(const at::Tensor& x) { return x.reshape_symint({-1, x.sym_size(-1)}).contiguous(); }

at::Tensor with_leading(const at::Tensor& rows, c10::SymIntArrayRef sizes) {
  std::vector<c10::SymInt> shape(sizes.begin(), sizes.end());
  shape.back() = rows.sym_size(-1);
  return rows.view_symint(shape);
}

class IntegerLinear : public torch::autograd::Function<IntegerLinear> {
 public:
  static Variable forward(AutogradContext* ctx, const Variable& x, const Variable& weight,
                          const std::optional<at::Tensor>& bias, const IntegerGrids& grids, bool transposed,
                          IntegerOptions options) {
    at::AutoDispatchBelowADInplaceOrView guard;
    const auto dtype = result_type(x, options.dtype);
    const auto q = quantize_both(rows_of(x), weight.contiguous(), std::nullopt, grids, transposed ? 1 : 0);
    auto [y, relu_mask] = integer_linear_forward(q.q_x, q.q_w, q.x_scale, q.x_zero_point, q.w_scale, bias, transposed,
                                                 options.relu, dtype);
    const bool x_needed = x.requires_grad();
    const bool bytes_needed = weight.requires_grad();
    ctx->save_for_backward({bytes_needed || x_needed ? q.q_x : at::Tensor(), x_needed ? q.x_mask : at::Tensor(),
                            q.x_scale, q.x_zero_point, q.q_w, bytes_needed ? q.w_mask : at::Tensor(), q.w_scale,
                            options.relu ? relu_mask : at::Tensor()});
    ctx->saved_data["sizes"] = x.sym_sizes().vec();
    ctx->saved_data["transposed"] = transposed;
    ctx->saved_data["bf16"] = options.bf16_gradients || dtype == at::kBFloat16;
    ctx->saved_data["types"] =
        std::vector<int64_t>{static_cast<int64_t>(x.scalar_type()), static_cast<int64_t>(weight.scalar_type()),
                             bias.has_value() ? static_cast<int64_t>(bias->scalar_type()) : -1};
    return with_leading(y, x.sym_sizes());
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    check_first_derivative("integer_linear");
    const auto saved = ctx->get_saved_variables();
    const auto sizes = ctx->saved_data["sizes"].toSymIntVector();
    const auto types = ctx->saved_data["types"].toIntVector();
    const auto type = [&](size_t i) { return static_cast<at::ScalarType>(types[i]); };
    const auto &q_x = saved[0], &q_w = saved[4], &relu_mask = saved[7];
    at::Tensor grad = rows_of(grads[0]);
    if (relu_mask.defined()) {
      grad = mask_gradient(grad, relu_mask, grad.sym_strides());
    }
    const std::array<bool, 2> need = {ctx->needs_input_grad(0), ctx->needs_input_grad(1)};
    at::Tensor gx, gw, gb;
    if (types[2] >= 0 && ctx->needs_input_grad(2)) {
      gb = at::sum(grad, {0}, false, at::kFloat).to(type(2));
    }
    if (need[0] || need[1]) {
      std::tie(gx, gw) =
          integer_linear_backward(grad, q_x, q_w, saved[2], saved[3], saved[6], ctx->saved_data["transposed"].toBool(),
                                  ctx->saved_data["bf16"].toBool(), need);
    }
    if (need[0]) {
      gx = mask_gradient(gx, saved[1], gx.sym_strides());
      gx = in_type(gx, type(0)).view_symint(sizes);
    }
    if (need[1]) {
      gw = in_type(mask_gradient(gw, saved[5], gw.sym_strides()), type(1));
    }
    return {need[0] ? gx : Variable(), need[1] ? gw : Variable(), gb, {}, {}, {}};
  }
};

bool is_differentiated(std::initializer_list<const at::Tensor*> tensors) {
  if (!at::GradMode::is_enabled()) {
    return false;
  }
  for (const auto* tensor : tensors) {
    if (tensor != nullptr && tensor->defined() && tensor->requires_grad()) {
      return true;
    }
  }
  return false;
}

const at::Tensor* pointer(const std::optional<at::Tensor>& tensor) { return tensor.has_value() ? &*tensor : nullptr; }

void check_linear(const at::Tensor& x, const at::Tensor& weight, const std::optional<at::Tensor>& bias,
                  const IntegerGrids& grids, bool transposed, std::optional<at::ScalarType> dtype) {
  constexpr const char* function = "integer_linear";
  TORCH_CHECK_VALUE(weight.dim() == 2, "[", function, "] weight must have 2 dimensions, got shape ",
                    weight.sym_sizes());
  check_layer(function, x, weight, bias, grids, weight.sym_size(transposed ? 1 : 0), dtype);
  const auto features = weight.sym_size(transposed ? 0 : 1);
  TORCH_CHECK_VALUE(x.dim() >= 1 && x.sym_size(-1) == features, "[", function, "] input must have ", features,
                    " features in its last dimension, got shape ", x.sym_sizes());
  check_sum_length(function, features);
}

at::Tensor integer_linear_plain(const at::Tensor& x, const at::Tensor& weight, const std::optional<at::Tensor>& bias,
                                const at::Tensor& x_scale, const at::Tensor& x_zero_point, int64_t x_qmin,
                                int64_t x_qmax, const at::Tensor& w_scale, const at::Tensor& w_zero_point,
                                int64_t w_qmin, int64_t w_qmax, bool transposed, bool relu, bool,
                                std::optional<at::ScalarType> dtype) {
  const IntegerGrids grids{x_scale, x_zero_point, x_qmin, x_qmax, w_scale, w_zero_point, w_qmin, w_qmax};
  check_linear(x, weight, bias, grids, transposed, dtype);
  const auto q = quantize_both(rows_of(x), weight.contiguous(), std::nullopt, grids, transposed ? 1 : 0);
  const auto y = std::get<0>(integer_linear_forward(q.q_x, q.q_w, q.x_scale, q.x_zero_point, q.w_scale, bias,
                                                    transposed, relu, result_type(x, dtype)));
  return with_leading(y, x.sym_sizes());
}

at::Tensor integer_linear_autograd(const at::Tensor& x, const at::Tensor& weight, const std::optional<at::Tensor>& bias,
                                   const at::Tensor& x_scale, const at::Tensor& x_zero_point, int64_t x_qmin,
                                   int64_t x_qmax, const at::Tensor& w_scale, const at::Tensor& w_zero_point,
                                   int64_t w_qmin, int64_t w_qmax, bool transposed, bool relu, bool bf16_gradients,
                                   std::optional<at::ScalarType> dtype) {
  if (!is_differentiated({&x, &weight, pointer(bias)})) {
    at::AutoDispatchBelowADInplaceOrView guard;
    return integer_linear_plain(x, weight, bias, x_scale, x_zero_point, x_qmin, x_qmax, w_scale, w_zero_point, w_qmin,
                                w_qmax, transposed, relu, bf16_gradients, dtype);
  }
  const IntegerGrids grids{x_scale, x_zero_point, x_qmin, x_qmax, w_scale, w_zero_point, w_qmin, w_qmax};
  check_linear(x, weight, bias, grids, transposed, dtype);
  return IntegerLinear::apply(x, weight, bias, grids, transposed, IntegerOptions{relu, bf16_gradients, dtype});
}

// --- Convolution ------------------------------------------------------------------------------------------------------

struct Geometry {
  std::vector<int64_t> stride, padding, dilation;
  int64_t groups;
};

Quantized quantize_for_conv(const at::Tensor& x, const at::Tensor& weight, const std::optional<at::Tensor>& multiplier,
                            const IntegerGrids& grids) {
  return quantize_both(channels_last(x), dense_filters(weight), multiplier, grids, 0);
}

at::Tensor as_torch_would(const at::Tensor& y, const at::Tensor& x, const at::Tensor& weight) {
  return is_channels_last(x) || is_channels_last(weight) ? y : y.contiguous();
}

class IntegerConv : public torch::autograd::Function<IntegerConv> {
 public:
  static Variable forward(AutogradContext* ctx, const Variable& x, const Variable& weight,
                          const std::optional<at::Tensor>& multiplier, const std::optional<at::Tensor>& bias,
                          const IntegerGrids& grids, const Geometry& geometry, IntegerOptions options) {
    at::AutoDispatchBelowADInplaceOrView guard;
    const auto dtype = result_type(x, options.dtype);
    const auto q = quantize_for_conv(x, weight, multiplier, grids);
    auto [y, relu_mask] =
        integer_conv_forward(q.q_x, q.q_w, q.x_scale, q.x_zero_point, q.w_scale, bias, geometry.stride,
                             geometry.padding, geometry.dilation, geometry.groups, options.relu, dtype);
    const bool x_needed = x.requires_grad();
    const bool weight_needed = weight.requires_grad();
    ctx->save_for_backward({weight_needed || x_needed ? q.q_x : at::Tensor(), x_needed ? q.x_mask : at::Tensor(),
                            q.x_scale, q.x_zero_point, q.q_w, weight_needed ? q.w_mask : at::Tensor(), q.w_scale,
                            options.relu ? relu_mask : at::Tensor()});
    ctx->saved_data["stride"] = geometry.stride;
    ctx->saved_data["padding"] = geometry.padding;
    ctx->saved_data["dilation"] = geometry.dilation;
    ctx->saved_data["groups"] = geometry.groups;
    ctx->saved_data["multiplied"] = multiplier.has_value();
    ctx->saved_data["bf16"] = options.bf16_gradients || dtype == at::kBFloat16;
    ctx->saved_data["types"] =
        std::vector<int64_t>{static_cast<int64_t>(x.scalar_type()), static_cast<int64_t>(weight.scalar_type()),
                             bias.has_value() ? static_cast<int64_t>(bias->scalar_type()) : -1};
    return as_torch_would(y, x, weight);
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    check_first_derivative("integer_conv");
    const auto saved = ctx->get_saved_variables();
    const auto types = ctx->saved_data["types"].toIntVector();
    const auto type = [&](size_t i) { return static_cast<at::ScalarType>(types[i]); };
    const auto &q_x = saved[0], &q_w = saved[4], &relu_mask = saved[7];
    at::Tensor grad = channels_last(grads[0]);
    if (relu_mask.defined()) {
      grad = mask_gradient(grad, relu_mask, grad.sym_strides());
    }
    const std::array<bool, 2> need = {ctx->needs_input_grad(0), ctx->needs_input_grad(1)};
    at::Tensor gx, gw, gb;
    // needs_input_grad counts the tensors that are there.
    if (types[2] >= 0 && ctx->needs_input_grad(ctx->saved_data["multiplied"].toBool() ? 3 : 2)) {
      std::vector<int64_t> axes = {0};
      for (int64_t d = 2; d < grad.dim(); ++d) {
        axes.push_back(d);
      }
      gb = at::sum(grad, axes, false, at::kFloat).to(type(2));
    }
    if (need[0] || need[1]) {
      std::tie(gx, gw) =
          integer_conv_backward(grad, q_x, q_w, saved[2], saved[3], saved[6], ctx->saved_data["stride"].toIntVector(),
                                ctx->saved_data["padding"].toIntVector(), ctx->saved_data["dilation"].toIntVector(),
                                ctx->saved_data["groups"].toInt(), ctx->saved_data["bf16"].toBool(), need);
    }
    if (need[0]) {
      gx = in_type(mask_gradient(gx, saved[1], gx.sym_strides()), type(0));
    }
    if (need[1]) {
      gw = in_type(mask_gradient(gw, saved[5], gw.sym_strides()), type(1));
    }
    return {need[0] ? gx : Variable(), need[1] ? gw : Variable(), {}, gb, {}, {}, {}};
  }
};

void check_conv(const at::Tensor& x, const at::Tensor& weight, const std::optional<at::Tensor>& multiplier,
                const std::optional<at::Tensor>& bias, const IntegerGrids& grids, at::IntArrayRef stride,
                at::IntArrayRef padding, at::IntArrayRef dilation, int64_t groups,
                std::optional<at::ScalarType> dtype) {
  constexpr const char* function = "integer_conv";
  check_geometry(function, x, weight, stride, padding, dilation, groups);
  check_layer(function, x, weight, bias, grids, weight.sym_size(0), dtype);
  TORCH_CHECK_NOT_IMPLEMENTED(weight.dim() < 5 || groups == 1, "[", function,
                              "] groups in three dimensions must execute simulated, got ", groups, " groups");
  if (multiplier.has_value()) {
    check_float(function, *multiplier, "multiplier");
    check_per_axis(function, weight, 0, *multiplier, "multiplier");
    TORCH_CHECK_VALUE(!multiplier->requires_grad(), "[", function,
                      "] multiplier is a constant and must not require a gradient");
  }
}

at::Tensor integer_conv_plain(const at::Tensor& x, const at::Tensor& weight,
                              const std::optional<at::Tensor>& multiplier, const std::optional<at::Tensor>& bias,
                              const at::Tensor& x_scale, const at::Tensor& x_zero_point, int64_t x_qmin, int64_t x_qmax,
                              const at::Tensor& w_scale, const at::Tensor& w_zero_point, int64_t w_qmin, int64_t w_qmax,
                              at::IntArrayRef stride, at::IntArrayRef padding, at::IntArrayRef dilation, int64_t groups,
                              bool relu, bool, std::optional<at::ScalarType> dtype) {
  const IntegerGrids grids{x_scale, x_zero_point, x_qmin, x_qmax, w_scale, w_zero_point, w_qmin, w_qmax};
  check_conv(x, weight, multiplier, bias, grids, stride, padding, dilation, groups, dtype);
  const auto q = quantize_for_conv(x, weight, multiplier, grids);
  const auto y = std::get<0>(integer_conv_forward(q.q_x, q.q_w, q.x_scale, q.x_zero_point, q.w_scale, bias, stride,
                                                  padding, dilation, groups, relu, result_type(x, dtype)));
  return as_torch_would(y, x, weight);
}

at::Tensor integer_conv_autograd(const at::Tensor& x, const at::Tensor& weight,
                                 const std::optional<at::Tensor>& multiplier, const std::optional<at::Tensor>& bias,
                                 const at::Tensor& x_scale, const at::Tensor& x_zero_point, int64_t x_qmin,
                                 int64_t x_qmax, const at::Tensor& w_scale, const at::Tensor& w_zero_point,
                                 int64_t w_qmin, int64_t w_qmax, at::IntArrayRef stride, at::IntArrayRef padding,
                                 at::IntArrayRef dilation, int64_t groups, bool relu, bool bf16_gradients,
                                 std::optional<at::ScalarType> dtype) {
  if (!is_differentiated({&x, &weight, pointer(bias)})) {
    at::AutoDispatchBelowADInplaceOrView guard;
    return integer_conv_plain(x, weight, multiplier, bias, x_scale, x_zero_point, x_qmin, x_qmax, w_scale, w_zero_point,
                              w_qmin, w_qmax, stride, padding, dilation, groups, relu, bf16_gradients, dtype);
  }
  const IntegerGrids grids{x_scale, x_zero_point, x_qmin, x_qmax, w_scale, w_zero_point, w_qmin, w_qmax};
  check_conv(x, weight, multiplier, bias, grids, stride, padding, dilation, groups, dtype);
  return IntegerConv::apply(x, weight, multiplier, bias, grids,
                            Geometry{stride.vec(), padding.vec(), dilation.vec(), groups},
                            IntegerOptions{relu, bf16_gradients, dtype});
}

}  // namespace

TORCH_LIBRARY_IMPL(rarefy, Autograd, m) {
  m.impl("quantize_mask", &NotDifferentiable<&quantize_mask>::call);
  m.impl("integer_linear_forward", &NotDifferentiable<&integer_linear_forward>::call);
  m.impl("integer_linear_backward", &NotDifferentiable<&integer_linear_backward>::call);
  m.impl("integer_conv_forward", &NotDifferentiable<&integer_conv_forward>::call);
  m.impl("integer_conv_backward", &NotDifferentiable<&integer_conv_backward>::call);
  m.impl("integer_linear", &integer_linear_autograd);
  m.impl("integer_conv", &integer_conv_autograd);
}

TORCH_LIBRARY_IMPL(rarefy, CompositeExplicitAutograd, m) {
  m.impl("integer_linear", &integer_linear_plain);
  m.impl("integer_conv", &integer_conv_plain);
}

}  // namespace rarefy::ops
