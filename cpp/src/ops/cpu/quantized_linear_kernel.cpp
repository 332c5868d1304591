#include <ATen/ops/add.h>
#include <ATen/ops/zeros.h>
#include <rarefy/ops/fake_quantize.h>
#include <rarefy/ops/quantized_linear.h>
#include <torch/library.h>

#include "ops/cpu/onednn.h"
#include "ops/integer_checks.h"

namespace rarefy::ops {
namespace {

void check_weight(const char* function, const at::Tensor& weight, int64_t least_dim, int64_t most_dim) {
  TORCH_CHECK_TYPE(weight.scalar_type() == at::kChar, "[", function, "] weight must be int8, got ",
                   weight.scalar_type());
  TORCH_CHECK_VALUE(weight.dim() >= least_dim && weight.dim() <= most_dim && weight.numel() > 0, "[", function,
                    "] weight must have ", least_dim == most_dim ? "" : "3 to ", most_dim,
                    " dimensions and no empty one, got shape ", weight.sizes());
}

struct Parameters {
  double scale;
  int64_t zero_point;
};

/// Checks what both layers share and reads the input's parameters.
Parameters check_input(const char* function, const at::Tensor& x, const at::Tensor& weight_scale,
                       const std::optional<at::Tensor>& bias, const at::Tensor& input_scale,
                       const at::Tensor& input_zero_point) {
  TORCH_CHECK_VALUE(x.is_cpu(), "[", function, "] input must be on the CPU, got ", x.device());
  TORCH_CHECK_TYPE(weight_scale.scalar_type() == at::kFloat, "[", function, "] weight_scale must be float32, got ",
                   weight_scale.scalar_type());
  TORCH_CHECK_VALUE(weight_scale.dim() == 1, "[", function, "] weight_scale must have shape [out], got ",
                    weight_scale.sizes());
  if (bias.has_value()) {
    TORCH_CHECK_TYPE(bias->scalar_type() == at::kFloat, "[", function, "] bias must be float32, got ",
                     bias->scalar_type());
    TORCH_CHECK_VALUE(bias->sizes() == weight_scale.sizes(), "[", function, "] bias must have shape ",
                      weight_scale.sizes(), ", got ", bias->sizes());
  }
  TORCH_CHECK_VALUE(input_scale.numel() == 1 && input_zero_point.numel() == 1, "[", function,
                    "] input_scale and input_zero_point must have 1 element, got ", input_scale.numel(), " and ",
                    input_zero_point.numel());
  return {input_scale.item<double>(), input_zero_point.item<int64_t>()};
}

struct QuantizedInput {
  at::Tensor values;  // uint8
  double scale;
  int64_t zero_point;
};

/// The input as uint8, the only activation type of oneDNN's int8 convolutions. A signed range moves up by 128 together with
/// its zero point: the same numbers under other names.
QuantizedInput quantize_input(const at::Tensor& x, const at::Tensor& scale, const at::Tensor& zero_point, int64_t qmin,
                              int64_t qmax, const Parameters& parameters) {
  const int64_t shift = qmin < 0 ? 128 : 0;
  const auto moved = shift == 0 ? zero_point : zero_point + shift;
  return {quantize(x, scale, moved, std::nullopt, qmin + shift, qmax + shift), parameters.scale,
          parameters.zero_point + shift};
}

at::Tensor pack_linear_weight_cpu(const at::Tensor& weight) {
  check_weight("pack_linear_weight", weight, 2, 2);
  check_sum_length("pack_linear_weight", weight.size(1));
  return onednn::pack_linear(weight);
}

at::Tensor quantized_linear_cpu(const at::Tensor& x, const at::Tensor& packed, const at::Tensor& weight_scale,
                                const std::optional<at::Tensor>& bias, const at::Tensor& input_scale,
                                const at::Tensor& input_zero_point, int64_t qmin, int64_t qmax, bool relu) {
  constexpr const char* function = "quantized_linear";
  const auto parameters = check_input(function, x, weight_scale, bias, input_scale, input_zero_point);
  // oneDNN keeps the packed weight as [in, out].
  TORCH_CHECK_VALUE(x.dim() >= 1 && x.size(-1) == packed.size(0), "[", function, "] input must have ", packed.size(0),
                    " features in its last dimension, got shape ", x.sizes());
  TORCH_CHECK_VALUE(weight_scale.size(0) == packed.size(1), "[", function, "] weight_scale must have shape [",
                    packed.size(1), "], got ", weight_scale.sizes());
  if (x.numel() == 0) {
    auto sizes = x.sizes().vec();
    sizes.back() = weight_scale.size(0);
    return at::zeros(sizes, weight_scale.options());
  }
  const auto q = quantize_input(x.contiguous(), input_scale, input_zero_point, qmin, qmax, parameters);
  return onednn::linear(q.values, q.scale, q.zero_point, packed, weight_scale, bias, relu);
}

at::Tensor pack_conv2d_weight_cpu(const at::Tensor& weight, const at::Tensor& weight_scale, at::IntArrayRef stride,
                                  at::IntArrayRef padding, at::IntArrayRef dilation, int64_t groups,
                                  at::IntArrayRef input_size, int64_t input_zero_point) {
  constexpr const char* function = "pack_conv2d_weight";
  check_weight(function, weight, 3, 5);
  TORCH_CHECK_VALUE(groups > 0 && weight.size(0) % groups == 0, "[", function, "] groups must divide ", weight.size(0),
                    " output channels, got ", groups);
  TORCH_CHECK_VALUE(static_cast<int64_t>(input_size.size()) == weight.dim() && input_size[1] == weight.size(1) * groups,
                    "[", function, "] input_size must have ", weight.dim(), " values, the second of them ",
                    weight.size(1) * groups, ", got ", input_size);
  check_sum_length(function, weight.numel() / weight.size(0));
  const onednn::Movement movement(function, weight.dim() - 2, stride, padding, dilation, groups);
  auto sizes = input_size.vec();
  if (weight.dim() == 3) {
    sizes.insert(sizes.begin() + 2, 1);
  }
  return onednn::pack_conv(weight.contiguous(), weight_scale, movement, sizes, input_zero_point);
}

at::Tensor quantized_conv2d_cpu(const at::Tensor& x, const at::Tensor& packed, const at::Tensor& weight_scale,
                                const std::optional<at::Tensor>& bias, const at::Tensor& input_scale,
                                const at::Tensor& input_zero_point, int64_t qmin, int64_t qmax, at::IntArrayRef stride,
                                at::IntArrayRef padding, at::IntArrayRef dilation, int64_t groups, bool relu) {
  constexpr const char* function = "quantized_conv2d";
  const auto parameters = check_input(function, x, weight_scale, bias, input_scale, input_zero_point);
  const auto dims = static_cast<int64_t>(stride.size());
  TORCH_CHECK_VALUE(dims >= 1 && dims <= 3 && x.dim() == dims + 2, "[", function, "] input must have ", dims + 2,
                    " dimensions (batch, channels, then one for each stride), got shape ", x.sizes());
  const onednn::Movement movement(function, dims, stride, padding, dilation, groups);
  const auto format = dims == 3 ? at::MemoryFormat::ChannelsLast3d : at::MemoryFormat::ChannelsLast;
  const auto q =
      quantize_input(onednn::with_height(x).contiguous(format), input_scale, input_zero_point, qmin, qmax, parameters);
  auto out = onednn::conv(q.values, q.scale, q.zero_point, packed, weight_scale, bias, movement, relu);
  // In the layout that torch's convolution would give: a model that calls view() on the result must still run.
  if (x.suggest_memory_format() != format) {
    out = out.contiguous();
  }
  return dims == 1 ? out.squeeze(2) : out;
}

}  // namespace

TORCH_LIBRARY_IMPL(rarefy, CPU, m) {
  m.impl("pack_linear_weight", &pack_linear_weight_cpu);
  m.impl("pack_conv2d_weight", &pack_conv2d_weight_cpu);
}

// The packed weight is an opaque oneDNN tensor, and that decides the dispatch key.
TORCH_LIBRARY_IMPL(rarefy, MkldnnCPU, m) {
  m.impl("quantized_linear", &quantized_linear_cpu);
  m.impl("quantized_conv2d", &quantized_conv2d_cpu);
}

}  // namespace rarefy::ops
