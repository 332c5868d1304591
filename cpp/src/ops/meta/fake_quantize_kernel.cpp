#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/empty_strided.h>
#include <rarefy/ops/fake_quantize.h>
#include <torch/library.h>

#include "ops/fake_quantize_checks.h"

namespace rarefy::ops {
namespace {

at::Tensor mask_for(const at::Tensor& x) {
  return at::empty_symint({mask_bytes(x.sym_numel())}, x.options().dtype(at::kByte));
}

at::Tensor fake_quantize_meta(const at::Tensor& x, const at::Tensor& scale, const at::Tensor& zero_point,
                              std::optional<int64_t> axis, int64_t qmin, int64_t qmax) {
  check_fake_quantize("fake_quantize", x, scale, zero_point, axis, qmin, qmax);
  return at::empty_like(x);
}

std::tuple<at::Tensor, at::Tensor> fake_quantize_mask_meta(const at::Tensor& x, const at::Tensor& scale,
                                                           const at::Tensor& zero_point, std::optional<int64_t> axis,
                                                           int64_t qmin, int64_t qmax) {
  return {fake_quantize_meta(x, scale, zero_point, axis, qmin, qmax), mask_for(x)};
}

at::Tensor fake_quantize_backward_meta(const at::Tensor& grad, const at::Tensor& mask, c10::SymIntArrayRef strides) {
  check_backward("fake_quantize_backward", grad, mask);
  return at::empty_strided_symint(grad.sym_sizes(), strides, grad.options());
}

void fake_quantize_backward_inplace_meta(at::Tensor& grad, const at::Tensor& mask) {
  check_backward("fake_quantize_backward_", grad, mask);
}

at::Tensor quantize_meta(const at::Tensor& x, const at::Tensor& scale, const at::Tensor& zero_point,
                         std::optional<int64_t> axis, int64_t qmin, int64_t qmax) {
  check_fake_quantize("quantize", x, scale, zero_point, axis, qmin, qmax);
  check_quantized_type("quantize", qmin, qmax);
  return at::empty_like(x, x.options().dtype(qmin < 0 ? at::kChar : at::kByte));
}

void observe_meta(const at::Tensor& x, at::Tensor& min_val, at::Tensor& max_val, at::Tensor& scale,
                  at::Tensor& zero_point, at::Tensor& skipped, std::optional<int64_t> axis,
                  std::optional<double> averaging_constant, int64_t qmin, int64_t qmax, bool symmetric) {
  check_observe("observe", x, min_val, max_val, scale, zero_point, skipped, axis, averaging_constant, qmin, qmax,
                symmetric);
}

at::Tensor observe_fake_quantize_meta(const at::Tensor& x, at::Tensor& min_val, at::Tensor& max_val, at::Tensor& scale,
                                      at::Tensor& zero_point, at::Tensor& skipped, std::optional<int64_t> axis,
                                      std::optional<double> averaging_constant, int64_t qmin, int64_t qmax,
                                      bool symmetric) {
  check_observe("observe_fake_quantize", x, min_val, max_val, scale, zero_point, skipped, axis, averaging_constant,
                qmin, qmax, symmetric);
  return at::empty_like(x);
}

std::tuple<at::Tensor, at::Tensor> observe_fake_quantize_mask_meta(const at::Tensor& x, at::Tensor& min_val,
                                                                   at::Tensor& max_val, at::Tensor& scale,
                                                                   at::Tensor& zero_point, at::Tensor& skipped,
                                                                   std::optional<int64_t> axis,
                                                                   std::optional<double> averaging_constant,
                                                                   int64_t qmin, int64_t qmax, bool symmetric) {
  return {observe_fake_quantize_meta(x, min_val, max_val, scale, zero_point, skipped, axis, averaging_constant, qmin,
                                     qmax, symmetric),
          mask_for(x)};
}

std::tuple<at::Tensor, at::Tensor> choose_qparams_meta(const at::Tensor& min_val, const at::Tensor& max_val,
                                                       int64_t qmin, int64_t qmax, bool symmetric) {
  check_choose_qparams("choose_qparams", min_val, max_val, qmin, qmax, symmetric);
  return {at::empty_symint(min_val.sym_sizes(), min_val.options().dtype(at::kFloat)),
          at::empty_symint(min_val.sym_sizes(), min_val.options().dtype(at::kInt))};
}

}  // namespace

TORCH_LIBRARY_IMPL(rarefy, Meta, m) {
  m.impl("fake_quantize", &fake_quantize_meta);
  m.impl("fake_quantize_mask", &fake_quantize_mask_meta);
  m.impl("fake_quantize_backward", &fake_quantize_backward_meta);
  m.impl("fake_quantize_backward_", &fake_quantize_backward_inplace_meta);
  m.impl("quantize", &quantize_meta);
  m.impl("observe", &observe_meta);
  m.impl("observe_fake_quantize", &observe_fake_quantize_meta);
  m.impl("observe_fake_quantize_mask", &observe_fake_quantize_mask_meta);
  m.impl("choose_qparams", &choose_qparams_meta);
}

}  // namespace rarefy::ops
