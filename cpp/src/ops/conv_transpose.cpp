#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/constant_pad_nd.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/relu.h>
#include <ATen/ops/stack.h>
#include <ATen/ops/zeros.h>
#include <c10/core/InferenceMode.h>
#include <rarefy/ops/conv_transpose.h>
#include <torch/library.h>

#include <algorithm>
#include <numeric>
#include <utility>

#include "ops/conv_transpose_phases.h"
#include "ops/cpu/packed_weights.h"
#include "ops/quantized_checks.h"
#include "ops/quantized_ops.h"

TORCH_LIBRARY_FRAGMENT(rarefy, m) {
  m.def(
      "integer_conv_transpose(Tensor x, Tensor weight, Tensor? bias, Tensor x_scale, Tensor x_zero_point, int x_qmin, "
      "int x_qmax, Tensor w_scale, Tensor w_zero_point, int w_qmin, int w_qmax, int[] stride, int[] padding, "
      "int[] output_padding, int[] dilation, int groups, bool relu, bool bf16_gradients, ScalarType? dtype) -> Tensor");
  m.def(
      "quantized_conv_transpose(Tensor x, Tensor weight, Tensor weight_scale, Tensor? bias, Tensor input_scale, "
      "Tensor input_zero_point, int qmin, int qmax, int[] stride, int[] padding, int[] output_padding, int[] dilation, "
      "int groups, bool relu, Tensor? output_scale=None, Tensor? output_zero_point=None, int output_qmin=0, "
      "int output_qmax=255) -> Tensor");
}

namespace rarefy::ops {

namespace {

/// A size as a number. Phases are counted, so that a compiled graph is one of these sizes.
int64_t number(const c10::SymInt& size) { return size.guard_int(__FILE__, __LINE__); }
int64_t size_of(const at::Tensor& x, int64_t axis) { return number(x.sym_size(axis)); }

}  // namespace

std::vector<Phase> phases_of(int64_t in, int64_t out, int64_t kernel, int64_t stride, int64_t padding, int64_t dilation,
                             int64_t length) {
  const auto common = std::gcd(stride, dilation);
  std::vector<Phase> phases;
  for (int64_t begin = 0; begin < std::min(stride, out); ++begin) {
    Phase p;
    p.begin = begin;
    p.length = length > 0 ? length : (out - begin + stride - 1) / stride;
    p.step = stride / common;
    p.dilation = dilation / common;
    const auto reaches = [&](int64_t tap) { return (begin + padding - tap * dilation) % stride == 0; };
    while (p.first < std::min(kernel, p.step) && !reaches(p.first)) {
      ++p.first;
    }
    p.count = p.first < std::min(kernel, p.step) ? (kernel - p.first + p.step - 1) / p.step : 0;
    // The input position of output position `begin` under the first and the last of these taps.
    const auto nearest = (begin + padding - p.first * dilation) / stride;
    const auto farthest = nearest - (p.count - 1) * p.dilation;
    if (p.count > 0 && (farthest > in - 1 || nearest + p.length - 1 < 0)) {
      p.count = 0;  // they read zeros alone
    }
    p.before = -farthest;
    p.after = p.length - 1 + nearest - (in - 1);
    phases.push_back(p);
  }
  return phases;
}

at::Tensor phase_weight(const at::Tensor& weight, int64_t groups, const std::vector<Phase>& phase) {
  auto w = weight.unflatten(0, {groups, size_of(weight, 0) / groups}).transpose(1, 2).flatten(0, 1);
  std::vector<int64_t> flipped;
  for (size_t i = 0; i < phase.size(); ++i) {
    const auto axis = static_cast<int64_t>(i) + 2;
    w = w.slice(axis, phase[i].first, size_of(w, axis), phase[i].step);
    flipped.push_back(axis);
  }
  return w.flip(flipped);
}

at::Tensor weight_by_channel(const at::Tensor& weight, int64_t groups) {
  return groups == 1 ? weight
                     : weight.unflatten(0, {groups, size_of(weight, 0) / groups}).transpose(0, 1).flatten(1, 2);
}

at::Tensor weight_by_group(const at::Tensor& weight, int64_t groups) {
  return groups == 1 ? weight
                     : weight.unflatten(1, {groups, size_of(weight, 1) / groups}).transpose(0, 1).flatten(0, 1);
}

namespace {

/// Returns the sizes of the result.
c10::SymDimVector check_movement(const char* function, const at::Tensor& x, const at::Tensor& weight,
                                 at::IntArrayRef stride, at::IntArrayRef padding, at::IntArrayRef output_padding,
                                 at::IntArrayRef dilation, int64_t groups) {
  TORCH_CHECK_VALUE(weight.dim() >= 3 && weight.dim() <= 5 && weight.sym_numel() > 0, "[", function,
                    "] weight must have 3 to 5 dimensions and no empty one, got shape ", weight.sym_sizes());
  TORCH_CHECK_VALUE(groups > 0 && weight.sym_size(0) % groups == 0, "[", function, "] groups must divide ",
                    weight.sym_size(0), " input channels, got ", groups);
  TORCH_CHECK_VALUE(x.dim() == weight.dim() && x.sym_size(1) == weight.sym_size(0), "[", function, "] input must have ",
                    weight.dim(), " dimensions and ", weight.sym_size(0), " channels, got shape ", x.sym_sizes());
  const auto dims = static_cast<size_t>(weight.dim() - 2);
  TORCH_CHECK_VALUE(
      stride.size() == dims && padding.size() == dims && output_padding.size() == dims && dilation.size() == dims, "[",
      function, "] stride, padding, output_padding and dilation must have ", dims, " values, got ", stride.size(), ", ",
      padding.size(), ", ", output_padding.size(), " and ", dilation.size());
  for (const auto& numbers : {stride, padding, output_padding, dilation}) {
    check_window_numbers(function, numbers);
  }
  c10::SymDimVector sizes = {x.sym_size(0), weight.sym_size(1) * groups};
  for (size_t i = 0; i < dims; ++i) {
    const auto axis = static_cast<int64_t>(i) + 2;
    TORCH_CHECK_VALUE(stride[i] > 0 && dilation[i] > 0 && padding[i] >= 0 && output_padding[i] >= 0, "[", function,
                      "] stride and dilation must be positive, padding and output_padding not negative, got ", stride,
                      ", ", dilation, ", ", padding, " and ", output_padding);
    TORCH_CHECK_VALUE(output_padding[i] < std::max(stride[i], dilation[i]), "[", function,
                      "] output_padding must be less than stride or dilation, got ", output_padding, " for ", stride,
                      " and ", dilation);
    const auto out = (x.sym_size(axis) - 1) * stride[i] - 2 * padding[i] + dilation[i] * (weight.sym_size(axis) - 1) +
                     output_padding[i] + 1;
    TORCH_CHECK_VALUE(x.sym_size(axis) > 0 && out > 0, "[", function, "] the result must have a size along axis ", axis,
                      ", got ", out, " for an input of ", x.sym_size(axis));
    sizes.push_back(out);
  }
  return sizes;
}

/// Every combination of phases, the last dimension fastest.
std::vector<std::vector<Phase>> combinations(const std::vector<std::vector<Phase>>& by_dimension) {
  std::vector<std::vector<Phase>> all(1);
  for (const auto& phases : by_dimension) {
    std::vector<std::vector<Phase>> longer;
    for (const auto& start : all) {
      for (const auto& phase : phases) {
        longer.push_back(start);
        longer.back().push_back(phase);
      }
    }
    all = std::move(longer);
  }
  return all;
}

bool has_taps(const std::vector<Phase>& phase) {
  return std::all_of(phase.begin(), phase.end(), [](const Phase& p) { return p.count > 0; });
}

std::vector<int64_t> dilations(const std::vector<Phase>& phase) {
  std::vector<int64_t> out;
  for (const auto& p : phase) {
    out.push_back(p.dilation);
  }
  return out;
}

/// What a phase without taps gives: the bias, [N, out, lengths...].
at::Tensor bias_alone(const at::Tensor& x, const c10::SymInt& channels, const std::optional<at::Tensor>& bias,
                      bool relu, const std::vector<Phase>& phase, at::ScalarType dtype) {
  c10::SymDimVector sizes{x.sym_size(0), channels}, one{1, channels};
  for (const auto& p : phase) {
    sizes.emplace_back(p.length);
    one.emplace_back(1);
  }
  if (!bias.has_value()) {
    return at::zeros_symint(sizes, x.options().dtype(dtype));
  }
  const auto values = bias->to(dtype).view_symint(one).expand_symint(sizes);
  return relu ? at::relu(values) : values;
}

/// Puts the phases, of equal lengths, side by side and cuts the result to size: differentiable.
at::Tensor interleaved(const std::vector<at::Tensor>& parts, const std::vector<std::vector<Phase>>& by_dimension,
                       c10::SymIntArrayRef sizes) {
  if (parts.size() == 1) {
    return parts[0];
  }
  const auto dims = by_dimension.size();
  // [N, out, lengths..., phases] to [N, out, length, phases, length, phases, ...]
  std::vector<int64_t> counts, order{0, 1};
  c10::SymDimVector merged{sizes[0], sizes[1]};
  for (size_t i = 0; i < dims; ++i) {
    const auto count = static_cast<int64_t>(by_dimension[i].size());
    counts.push_back(count);
    order.push_back(static_cast<int64_t>(2 + i));
    order.push_back(static_cast<int64_t>(2 + dims + i));
    merged.emplace_back(by_dimension[i][0].length * count);
  }
  auto y = at::stack(parts, -1).unflatten(-1, counts).permute(order).reshape_symint(merged);
  for (size_t i = 0; i < dims; ++i) {
    y = y.narrow(static_cast<int64_t>(i) + 2, 0, number(sizes[i + 2]));
  }
  return y.contiguous();
}

at::Tensor integer_conv_transpose_composite(const at::Tensor& x, const at::Tensor& weight,
                                            const std::optional<at::Tensor>& bias, const at::Tensor& x_scale,
                                            const at::Tensor& x_zero_point, int64_t x_qmin, int64_t x_qmax,
                                            const at::Tensor& w_scale, const at::Tensor& w_zero_point, int64_t w_qmin,
                                            int64_t w_qmax, at::IntArrayRef stride, at::IntArrayRef padding,
                                            at::IntArrayRef output_padding, at::IntArrayRef dilation, int64_t groups,
                                            bool relu, bool bf16_gradients, std::optional<at::ScalarType> dtype) {
  constexpr const char* function = "integer_conv_transpose";
  const auto sizes = check_movement(function, x, weight, stride, padding, output_padding, dilation, groups);
  TORCH_CHECK_VALUE(weight.dim() < 5 || groups == 1, "[", function,
                    "] groups must be 1 in three dimensions, which have no integer kernel with groups, got ", groups);
  const auto dims = stride.size();
  std::vector<std::vector<Phase>> by_dimension;
  for (size_t i = 0; i < dims; ++i) {
    const auto axis = static_cast<int64_t>(i) + 2;
    const auto out = number(sizes[i + 2]);
    by_dimension.push_back(phases_of(size_of(x, axis), out, size_of(weight, axis), stride[i], padding[i], dilation[i],
                                     (out + stride[i] - 1) / stride[i]));
  }
  const IntegerGrids grids{x_scale, x_zero_point, x_qmin, x_qmax, w_scale, w_zero_point, w_qmin, w_qmax};
  const IntegerOptions options{relu, bf16_gradients, dtype};
  const std::vector<int64_t> ones(dims, 1), zeros(dims, 0);
  std::vector<at::Tensor> parts;
  std::vector<size_t> empty;
  const auto phases = combinations(by_dimension);
  for (const auto& phase : phases) {
    if (!has_taps(phase)) {
      empty.push_back(parts.size());
      parts.emplace_back();
      continue;
    }
    std::vector<int64_t> pad;
    for (auto p = phase.rbegin(); p != phase.rend(); ++p) {
      pad.push_back(p->before);
      pad.push_back(p->after);
    }
    const bool pads = std::any_of(pad.begin(), pad.end(), [](int64_t amount) { return amount != 0; });
    parts.push_back(integer_conv(pads ? at::constant_pad_nd(x, pad) : x, phase_weight(weight, groups, phase),
                                 std::nullopt, bias, grids, ones, zeros, dilations(phase), groups, options));
  }
  auto type = dtype.value_or(x.scalar_type());
  for (const auto& part : parts) {
    type = part.defined() ? part.scalar_type() : type;
  }
  for (const auto i : empty) {
    parts[i] = bias_alone(x, sizes[1], bias, relu, phases[i], type);
  }
  return interleaved(parts, by_dimension, sizes);
}

/// The kernel of a phase, the same tensor at every call as long as the weight lives, so that its packed form is kept too.
at::Tensor kept_phase_weight(const at::Tensor& weight, int64_t groups, const std::vector<Phase>& phase) {
  if (!weight.device().is_cpu()) {
    return phase_weight(weight, groups, phase);
  }
  std::vector<int64_t> how{-1, groups};  // no other form of a weight begins so
  for (const auto& p : phase) {
    how.insert(how.end(), {p.first, p.step, p.count});
  }
  return packed_weight(weight, how, {}, [&] {
    const c10::InferenceMode guard(false);
    return phase_weight(weight, groups, phase).clone(at::MemoryFormat::Contiguous);
  });
}

void check_quantized(const at::Tensor& x, const at::Tensor& weight, const at::Tensor& weight_scale,
                     const OptionalTensor& bias, int64_t groups) {
  constexpr const char* function = "quantized_conv_transpose";
  check_values(function, "input", x);
  TORCH_CHECK_TYPE(weight.scalar_type() == at::kChar, "[", function, "] weight must be int8, got ",
                   weight.scalar_type());
  const auto out = weight.sym_size(1) * groups;
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

using QuantizedConvTransposeOp = at::Tensor(const at::Tensor& x, const at::Tensor& weight,
                                            const at::Tensor& weight_scale, const OptionalTensor& bias,
                                            const at::Tensor& input_scale, const at::Tensor& input_zero_point,
                                            int64_t qmin, int64_t qmax, at::IntArrayRef stride, at::IntArrayRef padding,
                                            at::IntArrayRef output_padding, at::IntArrayRef dilation, int64_t groups,
                                            bool relu, const OptionalTensor& output_scale,
                                            const OptionalTensor& output_zero_point, int64_t output_qmin,
                                            int64_t output_qmax);

at::Tensor quantized_conv_transpose_any(const at::Tensor& x, const at::Tensor& weight, const at::Tensor& weight_scale,
                                        const OptionalTensor& bias, const at::Tensor& input_scale,
                                        const at::Tensor& input_zero_point, int64_t qmin, int64_t qmax,
                                        at::IntArrayRef stride, at::IntArrayRef padding, at::IntArrayRef output_padding,
                                        at::IntArrayRef dilation, int64_t groups, bool relu,
                                        const OptionalTensor& output_scale, const OptionalTensor& output_zero_point,
                                        int64_t output_qmin, int64_t output_qmax) {
  constexpr const char* function = "quantized_conv_transpose";
  const auto sizes = check_movement(function, x, weight, stride, padding, output_padding, dilation, groups);
  check_quantized(x, weight, weight_scale, bias, groups);
  check_byte_grid(function, "input", x, input_scale, input_zero_point, qmin, qmax);
  const bool bytes = check_output_grid(function, x, output_scale, output_zero_point, output_qmin, output_qmax);
  const auto dims = stride.size();
  std::vector<std::vector<Phase>> by_dimension;
  for (size_t i = 0; i < dims; ++i) {
    const auto axis = static_cast<int64_t>(i) + 2;
    by_dimension.push_back(
        phases_of(x.size(axis), sizes[i + 2].expect_int(), weight.size(axis), stride[i], padding[i], dilation[i]));
  }
  const ByteGrid input{input_scale, input_zero_point, qmin, qmax};
  const auto output =
      bytes ? std::optional(ByteGrid{*output_scale, *output_zero_point, output_qmin, output_qmax}) : std::nullopt;
  const auto phases = combinations(by_dimension);
  // Every phase reads the input: it is rounded once.
  const auto q = x.scalar_type() == at::kByte || phases.size() == 1 ? x : requantize(x, input, input);
  auto y = at::empty(C10_AS_INTARRAYREF_SLOW(sizes), x.options().dtype(bytes ? at::kByte : at::kFloat),
                     x.suggest_memory_format());
  const std::vector<int64_t> ones(dims, 1);
  for (const auto& phase : phases) {
    auto slice = y;
    auto part = q;
    std::vector<int64_t> padded;
    for (size_t i = 0; i < dims; ++i) {
      const auto& p = phase[i];
      const auto axis = static_cast<int64_t>(i) + 2;
      slice = slice.slice(axis, p.begin, y.size(axis), stride[i]);
      if (p.count > 0) {
        const auto skip = std::max(-p.before, int64_t{0}), leave = std::max(-p.after, int64_t{0});
        part = part.narrow(axis, skip, part.size(axis) - skip - leave);
      }
      padded.push_back(std::max(p.before, int64_t{0}));
      padded.push_back(std::max(p.after, int64_t{0}));
    }
    if (has_taps(phase)) {
      slice.copy_(quantized_conv(part, kept_phase_weight(weight, groups, phase), weight_scale, bias, input, ones,
                                 padded, dilations(phase), groups, relu, output));
    } else {
      const auto values = bias_alone(x, sizes[1], bias, relu, phase, at::kFloat);
      slice.copy_(bytes ? requantize(values, *output, output) : values);
    }
  }
  return y;
}

at::Tensor quantized_conv_transpose_meta(const at::Tensor& x, const at::Tensor& weight, const at::Tensor& weight_scale,
                                         const OptionalTensor& bias, const at::Tensor& input_scale,
                                         const at::Tensor& input_zero_point, int64_t qmin, int64_t qmax,
                                         at::IntArrayRef stride, at::IntArrayRef padding,
                                         at::IntArrayRef output_padding, at::IntArrayRef dilation, int64_t groups,
                                         bool /*relu*/, const OptionalTensor& output_scale,
                                         const OptionalTensor& output_zero_point, int64_t output_qmin,
                                         int64_t output_qmax) {
  constexpr const char* function = "quantized_conv_transpose";
  const auto sizes = check_movement(function, x, weight, stride, padding, output_padding, dilation, groups);
  check_quantized(x, weight, weight_scale, bias, groups);
  check_byte_grid(function, "input", x, input_scale, input_zero_point, qmin, qmax);
  const bool bytes = check_output_grid(function, x, output_scale, output_zero_point, output_qmin, output_qmax);
  return at::empty_symint(sizes, x.options().dtype(bytes ? at::kByte : at::kFloat), x.suggest_memory_format());
}

}  // namespace

#define RAREFY_OP(name, ...) \
  static const auto op = c10::Dispatcher::singleton().findSchemaOrThrow("rarefy::" #name, "").typed<__VA_ARGS__>()

at::Tensor integer_conv_transpose(const at::Tensor& x, const at::Tensor& weight, const std::optional<at::Tensor>& bias,
                                  const IntegerGrids& grids, const TransposedMovement& movement,
                                  const IntegerOptions& options) {
  RAREFY_OP(integer_conv_transpose, decltype(integer_conv_transpose_composite));
  return op.call(x, weight, bias, grids.x_scale, grids.x_zero_point, grids.x_qmin, grids.x_qmax, grids.w_scale,
                 grids.w_zero_point, grids.w_qmin, grids.w_qmax, movement.stride, movement.padding,
                 movement.output_padding, movement.dilation, movement.groups, options.relu, options.bf16_gradients,
                 options.dtype);
}

at::Tensor quantized_conv_transpose(const at::Tensor& x, const at::Tensor& weight, const at::Tensor& weight_scale,
                                    const std::optional<at::Tensor>& bias, const ByteGrid& input,
                                    const TransposedMovement& movement, bool relu,
                                    const std::optional<ByteGrid>& output) {
  RAREFY_OP(quantized_conv_transpose, QuantizedConvTransposeOp);
  const auto scale = output.has_value() ? OptionalTensor(output->scale) : std::nullopt;
  const auto zero_point = output.has_value() ? OptionalTensor(output->zero_point) : std::nullopt;
  return op.call(x, weight, weight_scale, bias, input.scale, input.zero_point, input.qmin, input.qmax, movement.stride,
                 movement.padding, movement.output_padding, movement.dilation, movement.groups, relu, scale, zero_point,
                 output.has_value() ? output->qmin : 0, output.has_value() ? output->qmax : 255);
}

TORCH_LIBRARY_IMPL(rarefy, CompositeImplicitAutograd, m) {
  m.impl("integer_conv_transpose", &integer_conv_transpose_composite);
}

TORCH_LIBRARY_IMPL(rarefy, CompositeExplicitAutograd, m) {
  m.impl("quantized_conv_transpose", &quantized_conv_transpose_any);
}

TORCH_LIBRARY_IMPL(rarefy, Meta, m) { m.impl("quantized_conv_transpose", &quantized_conv_transpose_meta); }

}  // namespace rarefy::ops
