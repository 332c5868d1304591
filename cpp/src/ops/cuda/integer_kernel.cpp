// Integer execution on the GPU: torch's int8 matrix product, and elementwise steps around it. Nothing waits for the device.
#include <ATen/ops/_int_mm.h>
#include <ATen/ops/constant_pad_nd.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/full_like.h>
#include <ATen/ops/isnan.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/where.h>
#include <c10/core/DeviceGuard.h>
#include <rarefy/ops/fake_quantize.h>
#include <rarefy/ops/integer.h>
#include <rarefy/ops/relu.h>
#include <torch/library.h>

#include <algorithm>
#include <array>
#include <limits>
#include <vector>

#include "ops/integer_checks.h"
#include "ops/integer_ops.h"

namespace rarefy::ops {
namespace {

std::tuple<at::Tensor, at::Tensor, at::Tensor> quantize_mask_cuda(const at::Tensor& x, const at::Tensor& scale_,
                                                                  const at::Tensor& zero_point,
                                                                  std::optional<int64_t> axis, int64_t qmin,
                                                                  int64_t qmax,
                                                                  const std::optional<at::Tensor>& multiplier) {
  const int64_t resolved = check_quantize_mask("quantize_mask", x, scale_, zero_point, axis, qmin, qmax, multiplier);
  const c10::DeviceGuard guard(x.device());
  const auto scale = scale_.to(at::kFloat, /*non_blocking=*/false, /*copy=*/true, at::MemoryFormat::Contiguous);
  // float64 has no integer execution of its own: its integers are those of the value rounded to float32.
  at::Tensor values = x.scalar_type() == at::kDouble || multiplier.has_value() ? x.to(at::kFloat) : x;
  values = values.is_non_overlapping_and_dense() ? values : values.clone();
  if (multiplier.has_value()) {
    std::vector<int64_t> shape(static_cast<size_t>(x.dim()), 1);
    if (resolved >= 0) {
      shape[static_cast<size_t>(resolved)] = -1;
    }
    values = values * multiplier->to(at::kFloat).reshape(shape);
  }
  const auto used =
      at::where(at::isnan(values).any(), at::full_like(scale, std::numeric_limits<float>::quiet_NaN()), scale);
  return {quantize(values, scale, zero_point, axis, qmin, qmax),
          std::get<1>(fake_quantize_mask(values, scale, zero_point, axis, qmin, qmax)), used};
}

/// int32 [M, N] of int8 [M, K] and the transpose of [N, K]. The product takes M above 16, and K and N that are multiples of
/// 8: zeros around the matrices, which add nothing to a sum, make every size one of these.
at::Tensor integer_product(const at::Tensor& a, const at::Tensor& rows) {
  constexpr int64_t kFewestRows = 17, kMultiple = 8;
  const auto rest = [](int64_t size) { return (kMultiple - size % kMultiple) % kMultiple; };
  const int64_t m = a.size(0), n = rows.size(0), k = a.size(1);
  const auto padded = [](const at::Tensor& x, int64_t columns, int64_t more_rows) {
    return columns == 0 && more_rows == 0 ? x.contiguous() : at::constant_pad_nd(x, {0, columns, 0, more_rows});
  };
  const auto left = padded(a, rest(k), std::max<int64_t>(0, kFewestRows - m));
  const auto right = padded(rows, rest(k), rest(n));
  return at::_int_mm(left, right.t()).slice(0, 0, m).slice(1, 0, n);
}

/// Bytes as int8, and the zero point that goes with them.
std::pair<at::Tensor, at::Tensor> as_signed(const at::Tensor& q, const at::Tensor& zero_point) {
  const auto zero = zero_point.reshape({});
  return q.scalar_type() == at::kChar ? std::pair(q, zero) : std::pair(q.bitwise_xor(128).view(at::kChar), zero - 128);
}

std::tuple<at::Tensor, at::Tensor> integer_linear_forward_cuda(const at::Tensor& q_x_, const at::Tensor& q_w,
                                                               const at::Tensor& x_scale,
                                                               const at::Tensor& x_zero_point,
                                                               const at::Tensor& w_scale,
                                                               const std::optional<at::Tensor>& bias, bool transposed,
                                                               bool relu, at::ScalarType dtype) {
  constexpr const char* function = "integer_linear_forward";
  check_linear_bytes(function, q_x_, q_w, x_scale, x_zero_point, w_scale, transposed);
  const int64_t out = q_w.size(transposed ? 1 : 0);
  check_bias(function, q_x_, bias, out);
  check_result_type(function, dtype);
  const c10::DeviceGuard guard(q_x_.device());
  const auto no_mask = at::empty({0}, q_x_.options().dtype(at::kByte));
  if (q_x_.numel() == 0) {
    return {at::empty({0, out}, q_x_.options().dtype(dtype)), no_mask};
  }
  const auto [q_x, zero_point] = as_signed(q_x_, x_zero_point);
  const auto rows = transposed ? q_w.t() : q_w;
  const auto offset = rows.sum(1, /*keepdim=*/false, at::kInt) * zero_point;
  auto y = (integer_product(q_x, rows) - offset).to(at::kFloat) * (x_scale.reshape({}) * w_scale.reshape({-1}));
  if (bias.has_value()) {
    y = y + bias->to(at::kFloat);
  }
  if (!relu) {
    return {y.to(dtype), no_mask};
  }
  const auto [rectified, mask] = relu_mask(y);
  return {rectified.to(dtype), mask};
}

std::tuple<at::Tensor, at::Tensor> integer_linear_backward_cuda(const at::Tensor& grad_, const at::Tensor& q_x,
                                                                const at::Tensor& q_w, const at::Tensor& x_scale,
                                                                const at::Tensor& x_zero_point,
                                                                const at::Tensor& w_scale, bool transposed, bool bf16,
                                                                std::array<bool, 2> need) {
  constexpr const char* function = "integer_linear_backward";
  check_linear_bytes(function, q_x, q_w, x_scale, x_zero_point, w_scale, transposed);
  check_gradient(function, grad_, c10::SymDimVector{q_x.sym_size(0), q_w.sym_size(transposed ? 1 : 0)}, q_x);
  const c10::DeviceGuard guard(q_x.device());
  const auto rows = transposed ? q_w.t() : q_w;
  const auto s_x = x_scale.reshape({});
  const auto s_w = w_scale.reshape({-1});
  const auto zero_point = x_zero_point.reshape({});
  at::Tensor gx = at::empty({0}, q_x.options().dtype(at::kFloat)), gw = gx;
  const auto grad = grad_.to(at::kFloat);
  // bfloat16 holds the integers exactly; their scales go to the gradient and to the results.
  const auto scaled = bf16 ? (grad * s_w).to(at::kBFloat16) : grad;
  if (need[0]) {
    const auto weight = bf16 ? rows.to(at::kBFloat16) : rows.to(at::kFloat) * s_w.unsqueeze(1);
    gx = at::mm(scaled, weight).to(at::kFloat);
  }
  if (need[1]) {
    const auto x = q_x.to(at::kFloat) - zero_point;
    gw = bf16 ? at::mm(scaled.t(), x.to(at::kBFloat16)).to(at::kFloat) * (s_x / s_w).unsqueeze(1)
              : at::mm(scaled.t(), x * s_x);
    gw = (transposed ? gw.t() : gw).contiguous();
  }
  return {gx, gw};
}

}  // namespace

TORCH_LIBRARY_IMPL(rarefy, CUDA, m) {
  m.impl("quantize_mask", &quantize_mask_cuda);
  m.impl("integer_linear_forward", &integer_linear_forward_cuda);
  m.impl("integer_linear_backward", &integer_linear_backward_cuda);
}

}  // namespace rarefy::ops
