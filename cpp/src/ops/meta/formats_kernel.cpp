#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <rarefy/ops/formats.h>
#include <torch/library.h>

#include "ops/formats_checks.h"

namespace rarefy::ops {
namespace {

at::Tensor scale_like(const at::Tensor& x, const Sharing& sharing, at::ScalarType type = at::kFloat) {
  return at::empty_symint(scale_sizes(x, sharing), x.options().dtype(type));
}

std::vector<c10::SymInt> sizes_of(int64_t block) { return {c10::SymInt(block)}; }

at::Tensor fake_quantize_group_meta(const at::Tensor& x, const at::Tensor& scale, const at::Tensor& zero_point,
                                    std::optional<int64_t> axis, c10::SymIntArrayRef block, int64_t qmin, int64_t qmax,
                                    bool, const std::optional<at::Tensor>& seed) {
  check_group("fake_quantize_group", x, scale, zero_point, axis, block, qmin, qmax);
  check_seed("fake_quantize_group", seed);
  // Random numbers belong to places in the order of the axes.
  return at::empty_like(seed.has_value() ? x.contiguous() : x);
}

at::Tensor cast_minifloat_meta(const at::Tensor& x, const at::Tensor& scale, std::optional<int64_t> axis,
                               c10::SymIntArrayRef block, int64_t exponent_bits, int64_t mantissa_bits, int64_t bias,
                               c10::string_view specials, bool saturate, bool, const std::optional<at::Tensor>& seed) {
  check_scale("cast_minifloat", x, check_sharing("cast_minifloat", x, axis, block), scale);
  check_seed("cast_minifloat", seed);
  minifloat_shape("cast_minifloat", exponent_bits, mantissa_bits, bias, specials, saturate);
  return at::empty_like(seed.has_value() ? x.contiguous() : x);
}

at::Tensor fake_quantize_group_backward_meta(const at::Tensor& grad, const at::Tensor& x, const at::Tensor& scale,
                                             const at::Tensor& zero_point, std::optional<int64_t> axis,
                                             c10::SymIntArrayRef block, int64_t qmin, int64_t qmax) {
  check_group("fake_quantize_group_backward", x, scale, zero_point, axis, block, qmin, qmax);
  check_same_input("fake_quantize_group_backward", grad, x);
  return at::empty_like(x);
}

at::Tensor cast_minifloat_backward_meta(const at::Tensor& grad, const at::Tensor& x, const at::Tensor& scale,
                                        std::optional<int64_t> axis, c10::SymIntArrayRef block, int64_t exponent_bits,
                                        int64_t mantissa_bits, int64_t bias, c10::string_view specials) {
  check_scale("cast_minifloat_backward", x, check_sharing("cast_minifloat_backward", x, axis, block), scale);
  check_same_input("cast_minifloat_backward", grad, x);
  minifloat_shape("cast_minifloat_backward", exponent_bits, mantissa_bits, bias, specials, true);
  return at::empty_like(x);
}

std::tuple<at::Tensor, at::Tensor> group_qparams_meta(const at::Tensor& x, std::optional<int64_t> axis,
                                                      c10::SymIntArrayRef block, int64_t qmin, int64_t qmax,
                                                      bool symmetric, bool) {
  const auto sharing = check_sharing("group_qparams", x, axis, block);
  check_range("group_qparams", qmin, qmax);
  check_symmetric("group_qparams", qmin, qmax, symmetric);
  return {scale_like(x, sharing), scale_like(x, sharing, at::kInt)};
}

at::Tensor fake_quantize_dynamic_meta(const at::Tensor& x, std::optional<int64_t> axis, c10::SymIntArrayRef block,
                                      int64_t qmin, int64_t qmax, bool symmetric, bool) {
  check_sharing("fake_quantize_dynamic", x, axis, block);
  check_range("fake_quantize_dynamic", qmin, qmax);
  check_symmetric("fake_quantize_dynamic", qmin, qmax, symmetric);
  return at::empty_like(x);
}

at::Tensor minifloat_scale_meta(const at::Tensor& x, std::optional<int64_t> axis, c10::SymIntArrayRef block,
                                int64_t exponent_bits, int64_t mantissa_bits, int64_t bias, c10::string_view specials,
                                bool) {
  minifloat_shape("minifloat_scale", exponent_bits, mantissa_bits, bias, specials, true);
  return scale_like(x, check_sharing("minifloat_scale", x, axis, block));
}

at::Tensor cast_minifloat_dynamic_meta(const at::Tensor& x, std::optional<int64_t> axis, c10::SymIntArrayRef block,
                                       int64_t exponent_bits, int64_t mantissa_bits, int64_t bias,
                                       c10::string_view specials, bool) {
  check_sharing("cast_minifloat_dynamic", x, axis, block);
  minifloat_shape("cast_minifloat_dynamic", exponent_bits, mantissa_bits, bias, specials, true);
  return at::empty_like(x);
}

at::Tensor mx_scale_meta(const at::Tensor& x, c10::string_view element, int64_t block, int64_t axis) {
  mx_shape("mx_scale", element);
  return scale_like(x, check_sharing("mx_scale", x, axis, sizes_of(block)));
}

at::Tensor fake_quantize_mx_meta(const at::Tensor& x, c10::string_view element, int64_t block, int64_t axis) {
  mx_shape("fake_quantize_mx", element);
  check_sharing("fake_quantize_mx", x, axis, sizes_of(block));
  return at::empty_like(x);
}

at::Tensor nvfp4_tensor_scale_meta(const at::Tensor& x) {
  return scale_like(x, check_sharing("nvfp4_tensor_scale", x, std::nullopt, {}));
}

at::Tensor nvfp4_scale_meta(const at::Tensor& x, const at::Tensor&, int64_t block, int64_t axis) {
  return scale_like(x, check_sharing("nvfp4_scale", x, axis, sizes_of(block)));
}

at::Tensor fake_quantize_nvfp4_meta(const at::Tensor& x, const std::optional<at::Tensor>&, int64_t block,
                                    int64_t axis) {
  check_sharing("fake_quantize_nvfp4", x, axis, sizes_of(block));
  return at::empty_like(x);
}

at::Tensor nf4_scale_meta(const at::Tensor& x, int64_t block, int64_t, int64_t axis) {
  return scale_like(x, check_sharing("nf4_scale", x, axis, sizes_of(block)));
}

at::Tensor fake_quantize_nf4_meta(const at::Tensor& x, int64_t block, int64_t, int64_t axis) {
  check_sharing("fake_quantize_nf4", x, axis, sizes_of(block));
  return at::empty_like(x);
}

std::tuple<at::Tensor, at::Tensor> block_range_meta(const at::Tensor& x, std::optional<int64_t> axis,
                                                    c10::SymIntArrayRef block) {
  const auto sharing = check_sharing("block_range", x, axis, block);
  return {scale_like(x, sharing), scale_like(x, sharing)};
}

}  // namespace

TORCH_LIBRARY_IMPL(rarefy, Meta, m) {
  m.impl("fake_quantize_group", &fake_quantize_group_meta);
  m.impl("cast_minifloat", &cast_minifloat_meta);
  m.impl("fake_quantize_group_backward", &fake_quantize_group_backward_meta);
  m.impl("cast_minifloat_backward", &cast_minifloat_backward_meta);
  m.impl("group_qparams", &group_qparams_meta);
  m.impl("fake_quantize_dynamic", &fake_quantize_dynamic_meta);
  m.impl("minifloat_scale", &minifloat_scale_meta);
  m.impl("cast_minifloat_dynamic", &cast_minifloat_dynamic_meta);
  m.impl("mx_scale", &mx_scale_meta);
  m.impl("fake_quantize_mx", &fake_quantize_mx_meta);
  m.impl("nvfp4_tensor_scale", &nvfp4_tensor_scale_meta);
  m.impl("nvfp4_scale", &nvfp4_scale_meta);
  m.impl("fake_quantize_nvfp4", &fake_quantize_nvfp4_meta);
  m.impl("nf4_scale", &nf4_scale_meta);
  m.impl("fake_quantize_nf4", &fake_quantize_nf4_meta);
  m.impl("block_range", &block_range_meta);
}

}  // namespace rarefy::ops
