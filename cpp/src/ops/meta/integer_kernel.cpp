#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <rarefy/ops/integer.h>
#include <torch/library.h>

#include "ops/fake_quantize_checks.h"
#include "ops/integer_ops.h"

namespace rarefy::ops {
namespace {

at::Tensor mask_for(const at::Tensor& y, bool relu) {
  return at::empty_symint({relu ? mask_bytes(y.sym_numel()) : c10::SymInt(0)}, y.options().dtype(at::kByte));
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> quantize_mask_meta(const at::Tensor& x, const at::Tensor& scale,
                                                                  const at::Tensor& zero_point,
                                                                  std::optional<int64_t> axis, int64_t qmin,
                                                                  int64_t qmax, const std::optional<at::Tensor>&) {
  check_fake_quantize("quantize_mask", x, scale, zero_point, axis, qmin, qmax);
  check_quantized_type("quantize_mask", qmin, qmax);
  return {at::empty_like(x, x.options().dtype(qmin < 0 ? at::kChar : at::kByte)), mask_for(x, true),
          at::empty_like(scale, scale.options().dtype(at::kFloat))};
}

std::tuple<at::Tensor, at::Tensor> integer_linear_forward_meta(const at::Tensor& q_x, const at::Tensor& q_w,
                                                               const at::Tensor&, const at::Tensor&, const at::Tensor&,
                                                               const std::optional<at::Tensor>&, bool transposed,
                                                               bool relu, at::ScalarType dtype) {
  auto y = at::empty_symint({q_x.sym_size(0), q_w.sym_size(transposed ? 1 : 0)}, q_x.options().dtype(dtype));
  return {y, mask_for(y, relu)};
}

std::tuple<at::Tensor, at::Tensor> integer_linear_backward_meta(const at::Tensor&, const at::Tensor& q_x,
                                                                const at::Tensor& q_w, const at::Tensor&,
                                                                const at::Tensor&, const at::Tensor&, bool, bool,
                                                                std::array<bool, 2> need) {
  const auto options = q_x.options().dtype(at::kFloat);
  return {at::empty_symint(need[0] ? q_x.sym_sizes() : c10::SymIntArrayRef{0}, options),
          at::empty_symint(need[1] ? q_w.sym_sizes() : c10::SymIntArrayRef{0}, options)};
}

at::MemoryFormat channels_last(int64_t dimensions) {
  return dimensions == 4   ? at::MemoryFormat::ChannelsLast
         : dimensions == 5 ? at::MemoryFormat::ChannelsLast3d
                           : at::MemoryFormat::Contiguous;
}

std::tuple<at::Tensor, at::Tensor> integer_conv_forward_meta(const at::Tensor& q_x, const at::Tensor& q_w,
                                                             const at::Tensor&, const at::Tensor&, const at::Tensor&,
                                                             const std::optional<at::Tensor>&, at::IntArrayRef stride,
                                                             at::IntArrayRef padding, at::IntArrayRef dilation, int64_t,
                                                             bool relu, at::ScalarType dtype) {
  c10::SymDimVector sizes = {q_x.sym_size(0), q_w.sym_size(0)};
  for (int64_t d = 0; d + 2 < q_x.dim(); ++d) {
    const auto i = static_cast<size_t>(d);
    sizes.push_back((q_x.sym_size(d + 2) + 2 * padding[i] - dilation[i] * (q_w.sym_size(d + 2) - 1) - 1) / stride[i] +
                    1);
  }
  auto y = at::empty_symint(sizes, q_x.options().dtype(dtype), channels_last(q_x.dim()));
  return {y, mask_for(y, relu)};
}

std::tuple<at::Tensor, at::Tensor> integer_conv_backward_meta(const at::Tensor&, const at::Tensor& q_x,
                                                              const at::Tensor& q_w, const at::Tensor&,
                                                              const at::Tensor&, const at::Tensor&, at::IntArrayRef,
                                                              at::IntArrayRef, at::IntArrayRef, int64_t, bool,
                                                              std::array<bool, 2> need) {
  const auto options = q_x.options().dtype(at::kFloat);
  return {need[0] ? at::empty_like(q_x, options) : at::empty_symint(c10::SymIntArrayRef{0}, options),
          need[1] ? at::empty_like(q_w, options) : at::empty_symint(c10::SymIntArrayRef{0}, options)};
}

at::Tensor integer_multiplier_backward_meta(const at::Tensor&, const at::Tensor&, const at::Tensor&, const at::Tensor&,
                                            const at::Tensor&, const at::Tensor& multiplier) {
  return at::empty_like(multiplier);
}

}  // namespace

TORCH_LIBRARY_IMPL(rarefy, Meta, m) {
  m.impl("quantize_mask", &quantize_mask_meta);
  m.impl("integer_linear_forward", &integer_linear_forward_meta);
  m.impl("integer_linear_backward", &integer_linear_backward_meta);
  m.impl("integer_conv_forward", &integer_conv_forward_meta);
  m.impl("integer_conv_backward", &integer_conv_backward_meta);
  m.impl("integer_multiplier_backward", &integer_multiplier_backward_meta);
}

}  // namespace rarefy::ops
