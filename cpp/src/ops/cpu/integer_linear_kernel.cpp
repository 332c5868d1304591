#include <ATen/ops/empty.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include "ops/cpu/gradient_matmul.h"
#include "ops/cpu/integer_kernel.h"
#include "ops/integer_checks.h"
#include "ops/integer_ops.h"

namespace rarefy::ops {
namespace {

std::tuple<at::Tensor, at::Tensor> integer_linear_forward_cpu(const at::Tensor& q_x, const at::Tensor& q_w,
                                                              const at::Tensor& x_scale, const at::Tensor& x_zero_point,
                                                              const at::Tensor& w_scale,
                                                              const std::optional<at::Tensor>& bias, bool transposed,
                                                              bool relu, at::ScalarType dtype) {
  constexpr const char* function = "integer_linear_forward";
  check_linear_bytes(function, q_x, q_w, x_scale, x_zero_point, w_scale, transposed);
  const int64_t out = q_w.size(transposed ? 1 : 0);
  check_bias(function, q_x, bias, out);
  check_result_type(function, dtype);
  if (q_x.numel() == 0) {
    return {at::empty({0, out}, q_x.options().dtype(dtype)), at::empty({0}, q_x.options().dtype(at::kByte))};
  }
  const auto rows = transposed ? q_w.t().contiguous() : q_w.contiguous();
  const Epilogue epilogue(rows, x_scale, x_zero_point, w_scale, bias);
  return epilogue.apply(multiply_bytes(q_x.contiguous(), rows), relu, dtype);
}

std::tuple<at::Tensor, at::Tensor> integer_linear_backward_cpu(const at::Tensor& grad_, const at::Tensor& q_x,
                                                               const at::Tensor& q_w, const at::Tensor& x_scale,
                                                               const at::Tensor& x_zero_point,
                                                               const at::Tensor& w_scale, bool transposed, bool bf16,
                                                               std::array<bool, 2> need) {
  constexpr const char* function = "integer_linear_backward";
  check_linear_bytes(function, q_x, q_w, x_scale, x_zero_point, w_scale, transposed);
  const int64_t out = q_w.size(transposed ? 1 : 0);
  check_gradient(function, grad_, c10::SymDimVector{q_x.sym_size(0), c10::SymInt(out)}, q_x);
  const auto options = q_x.options().dtype(at::kFloat);
  at::Tensor gx = at::empty({0}, options), gw = at::empty({0}, options);
  if (q_x.numel() == 0) {
    return {need[0] ? at::zeros(q_x.sizes(), options) : gx, need[1] ? at::zeros(q_w.sizes(), options) : gw};
  }
  const auto scales = floats(w_scale);
  if (bf16) {
    // Input and weight are whole numbers of at most 9 bits, exact in bfloat16; their scales go to the gradient and to the
    // results.
    const auto columns = per_channel(w_scale, out);
    const auto grad =
        scale_to_bf16((grad_.scalar_type() == at::kDouble ? grad_.to(at::kFloat) : grad_).contiguous(), columns);
    if (need[0]) {
      const auto weight = dequantize(q_w, {1.0f}, 0, -1, at::kBFloat16);
      gx = at::mm(grad, transposed ? weight.t() : weight).to(at::kFloat);
    }
    if (need[1]) {
      const auto x = dequantize(q_x, {1.0f}, x_zero_point.item<int32_t>(), -1, at::kBFloat16);
      gw = scale_rows(at::mm(grad.t(), x), weight_gradient_scale(columns, x_scale));
      gw = transposed ? gw.t().contiguous() : gw;
    }
    return {gx, gw};
  }
  const auto grad = grad_.to(at::kFloat).contiguous();
  if (need[0]) {
    const auto weight = dequantize(q_w, scales, 0, transposed ? 1 : 0, at::kFloat);
    gx = matmul_transposed(grad, transposed ? weight : weight.t());
  }
  if (need[1]) {
    const auto x = dequantize(q_x, floats(x_scale), x_zero_point.item<int32_t>(), -1, at::kFloat);
    gw = transposed ? matmul_transposed(x.t(), grad.t()) : matmul_transposed(grad.t(), x.t());
  }
  return {gx, gw};
}

}  // namespace

TORCH_LIBRARY_IMPL(rarefy, CPU, m) {
  m.impl("integer_linear_forward", &integer_linear_forward_cpu);
  m.impl("integer_linear_backward", &integer_linear_backward_cpu);
}

}  // namespace rarefy::ops
