#include <rarefy/ops/formats.h>
#include <torch/library.h>

#include <cmath>

#include "ops/cpu/block_scales.h"
#include "ops/cpu/blocks.h"
#include "ops/nf4.h"

namespace rarefy::ops {
namespace {

// --- Scales from x ------------------------------------------------------------------------------------------------------

ScaleRule minifloat_rule(const MinifloatShape& shape, bool power_of_two) {
  ScaleRule rule{ScaleRule::Kind::minifloat};
  rule.greatest = shape.greatest();
  rule.power_of_two = power_of_two;
  return rule;
}

ScaleRule integer_rule(const char* function, int64_t qmin, int64_t qmax, bool symmetric, bool power_of_two) {
  check_range(function, qmin, qmax);
  check_symmetric(function, qmin, qmax, symmetric);
  TORCH_CHECK_VALUE(symmetric || !power_of_two, "[", function,
                    "] power_of_two needs a fixed zero point: symmetric must be true, got false");
  ScaleRule rule{ScaleRule::Kind::integer};
  rule.qmin = qmin;
  rule.qmax = qmax;
  rule.symmetric = symmetric;
  rule.power_of_two = power_of_two;
  return rule;
}

ScaleRule nvfp4_rule(const char* function, const at::Tensor& x, const at::Tensor& tensor_scale) {
  TORCH_CHECK_VALUE(tensor_scale.numel() == 1 && tensor_scale.scalar_type() == at::kFloat, "[", function,
                    "] tensor_scale must be one float32, got ", tensor_scale.numel(), " of ",
                    tensor_scale.scalar_type());
  TORCH_CHECK_VALUE(tensor_scale.device() == x.device(), "[", function, "] tensor_scale must be on the input's device ",
                    x.device(), ", got ", tensor_scale.device());
  ScaleRule rule{ScaleRule::Kind::nvfp4};
  rule.tensor_scale = tensor_scale.item<float>();
  TORCH_CHECK_VALUE(std::isfinite(rule.tensor_scale) && rule.tensor_scale >= kSmallestScale, "[", function,
                    "] tensor_scale must be finite and at least 2^-60, got ", rule.tensor_scale);
  return rule;
}

std::vector<c10::SymInt> sizes_of(int64_t block) { return {c10::SymInt(block)}; }

std::tuple<at::Tensor, at::Tensor> group_qparams_cpu(const at::Tensor& x, std::optional<int64_t> axis,
                                                     c10::SymIntArrayRef block, int64_t qmin, int64_t qmax,
                                                     bool symmetric, bool power_of_two) {
  const auto sharing = check_sharing("group_qparams", x, axis, block);
  const auto found = scales_of(x, sharing, integer_rule("group_qparams", qmin, qmax, symmetric, power_of_two));
  return {found.scale, found.zero_point};
}

at::Tensor minifloat_scale_cpu(const at::Tensor& x, std::optional<int64_t> axis, c10::SymIntArrayRef block,
                               int64_t exponent_bits, int64_t mantissa_bits, int64_t bias, c10::string_view specials,
                               bool power_of_two) {
  const auto sharing = check_sharing("minifloat_scale", x, axis, block);
  const auto shape = minifloat_shape("minifloat_scale", exponent_bits, mantissa_bits, bias, specials, true);
  return scales_of(x, sharing, minifloat_rule(shape, power_of_two)).scale;
}

at::Tensor mx_scale_cpu(const at::Tensor& x, c10::string_view element, int64_t block, int64_t axis) {
  const auto sharing = check_sharing("mx_scale", x, axis, sizes_of(block));
  ScaleRule rule{ScaleRule::Kind::mx};
  rule.exponent = mx_shape("mx_scale", element).greatest_exponent();
  return scales_of(x, sharing, rule).scale;
}

at::Tensor nvfp4_tensor_scale_cpu(const at::Tensor& x) {
  const auto sharing = check_sharing("nvfp4_tensor_scale", x, std::nullopt, {});
  ScaleRule rule{ScaleRule::Kind::minifloat};
  rule.greatest = 6.0 * 448.0;
  return scales_of(x, sharing, rule).scale;
}

at::Tensor nvfp4_scale_cpu(const at::Tensor& x, const at::Tensor& tensor_scale, int64_t block, int64_t axis) {
  const auto sharing = check_sharing("nvfp4_scale", x, axis, sizes_of(block));
  return scales_of(x, sharing, nvfp4_rule("nvfp4_scale", x, tensor_scale)).scale;
}

/// In place: as they come back from 8 bits.
void double_quantize(const at::Tensor& scale, int64_t scale_block) {
  auto* values = scale.data_ptr<float>();
  const int64_t n = scale.numel();
  const float mean = double_quantized_mean(values, n);
  for (int64_t begin = 0; begin < n; begin += scale_block) {
    const int64_t end = std::min(begin + scale_block, n);
    const float step = double_quantized_step(values, begin, end, mean);
    for (int64_t i = begin; i < end; ++i) {
      values[i] = double_dequantized(double_quantized(values[i], mean, step), mean, step);
    }
  }
}

at::Tensor nf4_scale_cpu(const at::Tensor& x, int64_t block, int64_t scale_block, int64_t axis) {
  const auto sharing = check_sharing("nf4_scale", x, axis, sizes_of(block));
  TORCH_CHECK_VALUE(scale_block >= 0, "[nf4_scale] scale_block must not be negative, got ", scale_block);
  const auto scale = scales_of(x, sharing, ScaleRule{ScaleRule::Kind::absmax}).scale;
  if (scale_block > 0) {
    double_quantize(scale, scale_block);
  }
  return scale;
}

std::tuple<at::Tensor, at::Tensor> block_range_cpu(const at::Tensor& x, std::optional<int64_t> axis,
                                                   c10::SymIntArrayRef block) {
  const auto sharing = check_sharing("block_range", x, axis, block);
  return range_of(x, sharing);
}

// --- Scales from x, and x rounded with them ------------------------------------------------------------------------------

at::Tensor fake_quantize_dynamic_cpu(const at::Tensor& x, std::optional<int64_t> axis, c10::SymIntArrayRef block,
                                     int64_t qmin, int64_t qmax, bool symmetric, bool power_of_two) {
  constexpr auto function = "fake_quantize_dynamic";
  const auto sharing = check_sharing(function, x, axis, block);
  const auto rule = integer_rule(function, qmin, qmax, symmetric, power_of_two);
  if (x.scalar_type() == at::kDouble || !is_local(x, sharing)) {
    const auto found = scales_of(x, sharing, rule);
    return fake_quantize_group(x, found.scale, found.zero_point, axis, block, qmin, qmax);
  }
  auto a = arrange(x, sharing);
  const cpu::IntegerRange range{static_cast<float>(qmin), static_cast<float>(qmax)};
  const bool streaming = bypasses_caches(a.out);
  with_scales_of(a, rule,
                 [&](const float* scale, const float* zero, const cpu::Blocks& blocks, int64_t begin, int64_t end) {
                   RAREFY_ISA_CALL(grid_blocks, a.in.const_data_ptr(), a.out.data_ptr(), blocks, scale, zero, range,
                                   streaming, begin, end);
                 });
  return a.finish();
}

/// Casts to a minifloat with scales by the rule; `factor` is multiplied to each (1: nothing).
at::Tensor cast_dynamic(const at::Tensor& x, const Sharing& sharing, const ScaleRule& rule, const MinifloatShape& shape,
                        float factor) {
  auto a = arrange(x, sharing);
  if (x.scalar_type() == at::kDouble || !is_local(x, sharing)) {
    const auto found = scales_of(x, sharing, rule).scale;
    const auto ordered = a.ordered(found);
    const auto* s = ordered.const_data_ptr<float>();
    std::vector<float> scale(s, s + ordered.numel());
    for (float& value : scale) {
      value *= factor;
    }
    if (x.scalar_type() == at::kDouble) {
      plain_loop<double>(a, a.in, a.out, [&](double value, size_t k, int64_t) {
        const auto by = static_cast<double>(scale[k]);
        return round_to_minifloat(value / by, shape) * by;
      });
      return a.finish();
    }
    parallel_words(a.in.numel(), [&](int64_t begin, int64_t end) {
      RAREFY_ISA_CALL(cast_blocks, a.in.const_data_ptr(), a.out.data_ptr(), a.blocks, scale.data(), shape.element(),
                      bypasses_caches(a.out), begin, end);
    });
    return a.finish();
  }
  const auto element = shape.element();
  const bool streaming = bypasses_caches(a.out);
  with_scales_of(
      a, rule,
      [&](const float* scale, const float*, const cpu::Blocks& blocks, int64_t begin, int64_t end) {
        RAREFY_ISA_CALL(cast_blocks, a.in.const_data_ptr(), a.out.data_ptr(), blocks, scale, element, streaming, begin,
                        end);
      },
      factor);
  return a.finish();
}

at::Tensor cast_minifloat_dynamic_cpu(const at::Tensor& x, std::optional<int64_t> axis, c10::SymIntArrayRef block,
                                      int64_t exponent_bits, int64_t mantissa_bits, int64_t bias,
                                      c10::string_view specials, bool power_of_two) {
  constexpr auto function = "cast_minifloat_dynamic";
  const auto sharing = check_sharing(function, x, axis, block);
  const auto shape = minifloat_shape(function, exponent_bits, mantissa_bits, bias, specials, true);
  return cast_dynamic(x, sharing, minifloat_rule(shape, power_of_two), shape, 1.0f);
}

at::Tensor fake_quantize_mx_cpu(const at::Tensor& x, c10::string_view element, int64_t block, int64_t axis) {
  const auto sharing = check_sharing("fake_quantize_mx", x, axis, sizes_of(block));
  const auto shape = mx_shape("fake_quantize_mx", element);
  ScaleRule rule{ScaleRule::Kind::mx};
  rule.exponent = shape.greatest_exponent();
  return cast_dynamic(x, sharing, rule, shape, 1.0f);
}

at::Tensor fake_quantize_nvfp4_cpu(const at::Tensor& x, const std::optional<at::Tensor>& tensor_scale, int64_t block,
                                   int64_t axis) {
  constexpr auto function = "fake_quantize_nvfp4";
  const auto sharing = check_sharing(function, x, axis, sizes_of(block));
  const auto rule = nvfp4_rule(function, x, tensor_scale.has_value() ? *tensor_scale : nvfp4_tensor_scale_cpu(x));
  return cast_dynamic(x, sharing, rule, e2m1_shape(), rule.tensor_scale);
}

at::Tensor fake_quantize_nf4_cpu(const at::Tensor& x, int64_t block, int64_t scale_block, int64_t axis) {
  constexpr auto function = "fake_quantize_nf4";
  const auto sharing = check_sharing(function, x, axis, sizes_of(block));
  const cpu::Table table{kNormalFloat.data(), kNormalFloatBounds.data(), static_cast<int>(kNormalFloat.size())};
  auto a = arrange(x, sharing);
  if (x.scalar_type() != at::kDouble && scale_block == 0 && is_local(x, sharing)) {
    with_scales_of(a, ScaleRule{ScaleRule::Kind::absmax},
                   [&](const float* scale, const float*, const cpu::Blocks& blocks, int64_t begin, int64_t end) {
                     RAREFY_ISA_CALL(table_blocks, a.in.const_data_ptr(), a.out.data_ptr(), blocks, scale, table, begin,
                                     end);
                   });
    return a.finish();
  }
  const auto scale = a.ordered(nf4_scale_cpu(x, block, scale_block, axis));
  const auto* s = scale.const_data_ptr<float>();
  if (x.scalar_type() == at::kDouble) {
    plain_loop<double>(a, a.in, a.out, [&](double value, size_t k, int64_t) {
      const auto by = static_cast<double>(s[k]);
      return std::isnan(value) ? value : static_cast<double>(kNormalFloat[normal_float_code(value / by)]) * by;
    });
    return a.finish();
  }
  parallel_words(a.in.numel(), [&](int64_t begin, int64_t end) {
    RAREFY_ISA_CALL(table_blocks, a.in.const_data_ptr(), a.out.data_ptr(), a.blocks, s, table, begin, end);
  });
  return a.finish();
}

}  // namespace

TORCH_LIBRARY_IMPL(rarefy, CPU, m) {
  m.impl("group_qparams", &group_qparams_cpu);
  m.impl("fake_quantize_dynamic", &fake_quantize_dynamic_cpu);
  m.impl("minifloat_scale", &minifloat_scale_cpu);
  m.impl("cast_minifloat_dynamic", &cast_minifloat_dynamic_cpu);
  m.impl("mx_scale", &mx_scale_cpu);
  m.impl("fake_quantize_mx", &fake_quantize_mx_cpu);
  m.impl("nvfp4_tensor_scale", &nvfp4_tensor_scale_cpu);
  m.impl("nvfp4_scale", &nvfp4_scale_cpu);
  m.impl("fake_quantize_nvfp4", &fake_quantize_nvfp4_cpu);
  m.impl("nf4_scale", &nf4_scale_cpu);
  m.impl("fake_quantize_nf4", &fake_quantize_nf4_cpu);
  m.impl("block_range", &block_range_cpu);
}

}  // namespace rarefy::ops
