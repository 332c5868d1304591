#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <rarefy/ops/fake_quantize_learned.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "ops/allocate.h"
#include "ops/cpu/dense.h"
#include "ops/cpu/fake_quantize_kernel.h"
#include "ops/cpu/fake_quantize_learned_simd.h"
#include "ops/cpu/grid.h"
#include "ops/cpu/sum_pieces.h"
#include "ops/fake_quantize_learned_checks.h"

namespace rarefy::ops {
namespace {

at::Tensor learned_cpu(const at::Tensor& x, const at::Tensor& scale, const at::Tensor& zero_point,
                       std::optional<int64_t> axis, int64_t qmin, int64_t qmax, double gradient_scale) {
  constexpr const char* function = "fake_quantize_learned";
  const int64_t resolved = check_learned(function, x, scale, zero_point, axis, qmin, qmax, gradient_scale);
  const auto in = dense(x);
  auto out = empty_for(in);
  fake_quantize_into(function, in, out, nullptr, scale, zero_point, resolved, qmin, qmax);
  return out;
}

/// The formula in float64, plain: for reference runs, where speed is not the point.
std::vector<double> learned_gradient_double(const at::Tensor& grad, const at::Tensor& x, const at::Tensor& out,
                                            cpu::Layout layout, const QuantizationGrid<double>& grid) {
  const double* g = grad.const_data_ptr<double>();
  const double* in = x.const_data_ptr<double>();
  double* to = out.data_ptr<double>();
  return sum_pieces(x.numel(), layout.channels, [&](int64_t begin, int64_t end, double* sums) {
    for (int64_t i = begin; i < end; ++i) {
      const auto channel = static_cast<size_t>(i / layout.inner % layout.channels);
      const auto [clamped, q] = grid.index(in[i], channel);
      const bool inside = q == clamped;
      const double upstream = g[i];
      if (!std::isnan(q)) {
        sums[channel] += upstream * (clamped - grid.zero_point[channel] - (inside ? in[i] / grid.scale[channel] : 0.0));
      }
      to[i] = inside ? upstream : 0.0;
    }
  });
}

/// dx into `out` (it may be grad), with the strides of a dense x that grad has too; returns dscale.
at::Tensor learned_gradient_into(const char* function, const at::Tensor& grad, const at::Tensor& x,
                                 const at::Tensor& out, const at::Tensor& scale, const at::Tensor& zero_point,
                                 int64_t axis, int64_t qmin, int64_t qmax, double gradient_scale) {
  const auto layout = layout_of(x, axis);
  auto dscale = at::empty(scale.sizes(), scale.options());
  std::vector<double> sums;
  cpu::Layout summed = layout;
  if (x.scalar_type() == at::kDouble) {
    sums = learned_gradient_double(grad, x, out, layout, {function, scale, zero_point, qmin, qmax});
  } else {
    const VectorGrid grid(function, x, axis, scale, zero_point, qmin, qmax);
    summed = grid.layout();
    const void *g = grad.const_data_ptr(), *in = x.const_data_ptr();
    void* to = out.data_ptr();
    const bool streaming = g != to && bypasses_caches(out);
    const size_t columns = cpu::sums_by_row(summed) ? static_cast<size_t>(summed.channels) : 0;
    sums = sum_pieces(x.numel(), summed.channels, [&](int64_t begin, int64_t end, double* piece) {
      std::vector<float> scratch(columns);
      RAREFY_ISA_CALL(learned_gradient, g, in, to, summed, grid.view(), streaming, piece, scratch.data(), begin, end);
    });
  }
  // Where the pattern of channels was written out for the vectors, it is folded together again.
  std::vector<double> total(static_cast<size_t>(layout.channels));
  for (int64_t c = 0; c < summed.channels; ++c) {
    const int64_t channel = summed.channels == layout.channels ? c : c / layout.inner % layout.channels;
    total[static_cast<size_t>(channel)] += sums[static_cast<size_t>(c)];
  }
  float* result = dscale.data_ptr<float>();
  for (size_t c = 0; c < total.size(); ++c) {
    const auto value = static_cast<float>(gradient_scale * total[c]);
    result[c] = std::isnan(value) ? std::numeric_limits<float>::quiet_NaN() : value;  // one NaN on every path
  }
  return dscale;
}

std::tuple<at::Tensor, at::Tensor> learned_backward_cpu(const at::Tensor& grad, const at::Tensor& x,
                                                        const at::Tensor& scale, const at::Tensor& zero_point,
                                                        std::optional<int64_t> axis, int64_t qmin, int64_t qmax,
                                                        double gradient_scale) {
  constexpr const char* function = "fake_quantize_learned_backward";
  const int64_t resolved = check_learned(function, x, scale, zero_point, axis, qmin, qmax, gradient_scale);
  check_learned_gradient(function, grad, x);
  const auto in = dense(x);
  auto out = empty_for(in);
  const bool in_order = grad.strides() == in.strides();
  if (!in_order) {
    out.copy_(grad);
  }
  auto dscale = learned_gradient_into(function, in_order ? grad : out, in, out, scale, zero_point, resolved, qmin, qmax,
                                      gradient_scale);
  return {out, dscale};
}

at::Tensor learned_backward_inplace_cpu(at::Tensor& grad, const at::Tensor& x, const at::Tensor& scale,
                                        const at::Tensor& zero_point, std::optional<int64_t> axis, int64_t qmin,
                                        int64_t qmax, double gradient_scale) {
  constexpr const char* function = "fake_quantize_learned_backward_";
  const int64_t resolved = check_learned(function, x, scale, zero_point, axis, qmin, qmax, gradient_scale);
  check_learned_gradient(function, grad, x);
  check_learned_in_place(function, grad, x);
  return learned_gradient_into(function, grad, x, grad, scale, zero_point, resolved, qmin, qmax, gradient_scale);
}

}  // namespace

TORCH_LIBRARY_IMPL(rarefy, CPU, m) {
  m.impl("fake_quantize_learned", &learned_cpu);
  m.impl("fake_quantize_learned_backward", &learned_backward_cpu);
  m.impl("fake_quantize_learned_backward_", &learned_backward_inplace_cpu);
}

}  // namespace rarefy::ops
