#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <rarefy/ops/fake_quantize_range.h>
#include <torch/library.h>

#include <cmath>
#include <limits>
#include <vector>

#include "ops/allocate.h"
#include "ops/cpu/dense.h"
#include "ops/cpu/fake_quantize_kernel.h"
#include "ops/cpu/fake_quantize_range_simd.h"
#include "ops/cpu/sum_pieces.h"
#include "ops/fake_quantize_range_anywhere.h"
#include "ops/fake_quantize_range_checks.h"

namespace rarefy::ops {
namespace {

std::vector<float> values_of(const at::Tensor& parameter) {
  const auto dense_values = parameter.contiguous();
  const auto* values = dense_values.const_data_ptr<float>();
  return {values, values + dense_values.numel()};
}

void check_scales(const char* function, const std::vector<float>& scales) {
  for (size_t i = 0; i < scales.size(); ++i) {
    TORCH_CHECK_VALUE(std::isfinite(scales[i]) && scales[i] > 0.0f, "[", function,
                      "] scale must be finite and positive, got ", scales[i], " at index ", i);
  }
}

/// The integers of the ends where all channels have the same, as fake_quantize takes them with a zero point of 0.
std::optional<std::pair<int64_t, int64_t>> common_limits(const std::vector<float>& scales, const at::Tensor& low,
                                                         const at::Tensor& high) {
  const auto lows = values_of(low), highs = values_of(high);
  std::optional<std::pair<int64_t, int64_t>> limits;
  for (size_t i = 0; i < scales.size(); ++i) {
    const float least = std::nearbyint(lows[i] / scales[i]), greatest = std::nearbyint(highs[i] / scales[i]);
    if (!(least >= -32768.0f && least <= 0.0f && greatest >= 0.0f && greatest <= 65535.0f && least < greatest)) {
      return std::nullopt;
    }
    const std::pair<int64_t, int64_t> own{static_cast<int64_t>(least), static_cast<int64_t>(greatest)};
    if (limits.has_value() && *limits != own) {
      return std::nullopt;
    }
    limits = own;
  }
  return limits;
}

at::Tensor range_cpu(const at::Tensor& x, const at::Tensor& scale, const at::Tensor& low, const at::Tensor& high,
                     std::optional<int64_t> axis, double gradient_scale) {
  constexpr const char* function = "fake_quantize_range";
  const int64_t resolved = check_learned_range(function, x, scale, low, high, axis, gradient_scale);
  const auto scales = values_of(scale);
  check_scales(function, scales);
  const auto limits = common_limits(scales, low, high);
  if (!limits.has_value() || x.scalar_type() == at::kDouble) {
    return range_anywhere(x, scale, low, high, axis, gradient_scale);
  }
  const auto in = dense(x);
  auto out = empty_for(in);
  const auto zeros = at::zeros(scale.sizes(), scale.options().dtype(at::kInt));
  fake_quantize_into(function, in, out, nullptr, scale, zeros, resolved, limits->first, limits->second);
  return out;
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> range_backward_cpu(
    const at::Tensor& grad, const at::Tensor& x, const at::Tensor& scale, const at::Tensor& low, const at::Tensor& high,
    std::optional<int64_t> axis, double gradient_scale) {
  constexpr const char* function = "fake_quantize_range_backward";
  const int64_t resolved = check_learned_range(function, x, scale, low, high, axis, gradient_scale);
  check_learned_gradient(function, grad, x);
  const auto scales = values_of(scale);
  check_scales(function, scales);
  if (x.scalar_type() == at::kDouble) {
    return range_backward_anywhere(grad, x, scale, low, high, axis, gradient_scale);
  }
  const auto in = dense(x);
  auto out = empty_for(in);
  const bool in_order = grad.strides() == in.strides();
  if (!in_order) {
    out.copy_(grad);
  }
  const auto layout = layout_of(in, resolved);
  const auto lows = values_of(low), highs = values_of(high);
  std::vector<float> before_low, after_high;
  constexpr float infinity = std::numeric_limits<float>::infinity();
  for (size_t i = 0; i < lows.size(); ++i) {
    before_low.push_back(std::nextafter(lows[i], -infinity));
    after_high.push_back(std::nextafter(highs[i], infinity));
  }
  const cpu::Ends ends{scales.data(), lows.data(), highs.data(), before_low.data(), after_high.data()};
  const void *g = in_order ? grad.const_data_ptr() : out.const_data_ptr(), *values = in.const_data_ptr();
  void* to = out.data_ptr();
  const auto sums = sum_pieces(in.numel(), 3 * layout.channels, [&](int64_t begin, int64_t end, double* piece) {
    RAREFY_ISA_CALL(range_gradient, g, values, to, layout, ends, piece, begin, end);
  });
  std::vector<at::Tensor> gradients;
  for (int64_t kind = 0; kind < 3; ++kind) {
    gradients.push_back(at::empty(scale.sizes(), scale.options()));
    auto* result = gradients.back().data_ptr<float>();
    for (int64_t c = 0; c < layout.channels; ++c) {
      result[c] = static_cast<float>(gradient_scale * sums[static_cast<size_t>(3 * c + kind)]);
    }
  }
  return {out, gradients[0], gradients[1], gradients[2]};
}

}  // namespace

TORCH_LIBRARY_IMPL(rarefy, CPU, m) {
  m.impl("fake_quantize_range", &range_cpu);
  m.impl("fake_quantize_range_backward", &range_backward_cpu);
}

}  // namespace rarefy::ops
