#include "ops/cpu/integer_kernel.h"

#include <ATen/ops/_int_mm.h>
#include <rarefy/ops/integer.h>

#include <algorithm>

#include "ops/allocate.h"
#include "ops/cpu/dense.h"
#include "ops/cpu/integer_simd.h"
#include "ops/fake_quantize_checks.h"

namespace rarefy::ops {
namespace {

cpu::FloatType float_type(at::ScalarType type) {
  return type == at::kBFloat16 ? cpu::FloatType::bf16 : type == at::kHalf ? cpu::FloatType::f16 : cpu::FloatType::f32;
}

/// The second argument of at::_int_mm. Both strides of a transposed column are 1, and at::_int_mm takes them for those of a
/// column, which it then reads beyond its end.
at::Tensor transposed(const at::Tensor& rows) {
  const int64_t n = rows.size(0);
  return rows.size(1) == 1 ? rows.as_strided({1, n}, {n, 1}) : rows.t();
}

/// Rows of `columns` elements below which a second thread does not pay.
int64_t row_grain(int64_t columns) { return std::max<int64_t>(1, kGrain / (columns + 1)); }

/// The dot-product instructions AVX512-VNNI and AVX-VNNI sum products of bytes in 32 bits.
bool processor_has_dot_products() {
#if defined(__x86_64__)
  return __builtin_cpu_supports("avx512vnni") || __builtin_cpu_supports("avxvnni");
#else
  return false;
#endif
}

}  // namespace

std::vector<float> floats(const at::Tensor& values) {
  const auto flat = values.to(at::kFloat).contiguous();
  return {flat.const_data_ptr<float>(), flat.const_data_ptr<float>() + flat.numel()};
}

std::vector<float> per_channel(const at::Tensor& values, int64_t n) {
  auto out = floats(values);
  if (out.size() == 1) {
    out.resize(static_cast<size_t>(n), out[0]);
  }
  return out;
}

at::Tensor dequantize(const at::Tensor& q_, const std::vector<float>& scale, int32_t zero_point, int64_t axis,
                      at::ScalarType type) {
  const auto q = dense(q_);
  const auto bytes_layout = layout_of(q, scale.size() == 1 ? -1 : axis);
  const cpu::Layout layout{float_type(type), bytes_layout.channels, bytes_layout.inner};
  auto y = empty_for(q, type);
  const std::vector<float> zeros(scale.size(), static_cast<float>(zero_point));
  const auto* bytes = static_cast<const uint8_t*>(q.const_data_ptr());
  void* out = y.data_ptr();
  const bool is_signed = q.scalar_type() == at::kChar;
  parallel_words(q.numel(), [&](int64_t begin, int64_t end) {
    RAREFY_ISA_CALL(dequantize, bytes, is_signed, out, layout, scale.data(), zeros.data(), begin, end);
  });
  return y;
}

at::Tensor multiply_bytes(const at::Tensor& a, const at::Tensor& rows) { return at::_int_mm(a, transposed(rows)); }

void multiply_bytes_into(at::Tensor& out, const at::Tensor& a, const at::Tensor& rows) {
  at::_int_mm_out(out, a, transposed(rows));
}

Epilogue::Epilogue(const at::Tensor& rows, const at::Tensor& x_scale, const at::Tensor& x_zero_point,
                   const at::Tensor& w_scale, const std::optional<at::Tensor>& bias)
    : offset_(static_cast<size_t>(rows.size(0))), scale_(per_channel(w_scale, rows.size(0))) {
  const auto s = x_scale.item<float>();
  for (auto& value : scale_) {
    value = s * value;
  }
  if (bias.has_value()) {
    bias_ = floats(*bias);
  }
  const auto zero_point = x_zero_point.item<int32_t>();
  if (zero_point == 0) {
    return;
  }
  const auto* weight = rows.const_data_ptr<int8_t>();
  at::parallel_for(0, rows.size(0), row_grain(rows.size(1)), [&](int64_t begin, int64_t end) {
    RAREFY_ISA_CALL(sum_bytes, weight, rows.size(1), offset_.data(), begin, end);
  });
  for (auto& value : offset_) {
    value *= zero_point;
  }
}

std::tuple<at::Tensor, at::Tensor> Epilogue::apply(const at::Tensor& sums, bool relu, at::ScalarType dtype) const {
  at::Tensor y = dtype == at::kFloat ? sums.view(at::kFloat) : empty_cached(sums.sizes(), dtype);
  at::Tensor mask = empty_cached({relu ? mask_bytes(sums.numel()) : 0}, at::kByte);
  const cpu::Finish finish{sums.size(1), offset_.data(), scale_.data(), bias_.empty() ? nullptr : bias_.data(), relu};
  const auto* in = sums.const_data_ptr<int32_t>();
  void* out = y.data_ptr();
  uint8_t* bits = relu ? mask.data_ptr<uint8_t>() : nullptr;
  const auto type = float_type(dtype);
  parallel_words(sums.numel(), [&](int64_t begin, int64_t end) {
    RAREFY_ISA_CALL(finish_sums, in, out, type, bits, finish, begin, end);
  });
  return {y, mask};
}

at::Tensor positive_mask(const at::Tensor& y) {
  auto mask = empty_cached({mask_bytes(y.numel())}, at::kByte);
  const auto* values = y.const_data_ptr<float>();
  auto* bits = mask.data_ptr<uint8_t>();
  parallel_words(y.numel(),
                 [&](int64_t begin, int64_t end) { RAREFY_ISA_CALL(positive_mask, values, bits, begin, end); });
  return mask;
}

at::Tensor scale_to_bf16(const at::Tensor& grad, const std::vector<float>& scale) {
  auto out = empty_for(grad, at::kBFloat16);
  const void* in = grad.const_data_ptr();
  void* y = out.data_ptr();
  const auto type = float_type(grad.scalar_type());
  const auto columns = static_cast<int64_t>(scale.size());
  parallel_words(grad.numel(), [&](int64_t begin, int64_t end) {
    RAREFY_ISA_CALL(scale_to_bf16, in, type, y, columns, scale.data(), begin, end);
  });
  return out;
}

at::Tensor scale_rows(const at::Tensor& x, const std::vector<float>& scale) {
  auto out = empty_for(x, at::kFloat);
  const int64_t columns = x.numel() / x.size(0);
  const void* in = x.const_data_ptr();
  auto* y = out.data_ptr<float>();
  at::parallel_for(0, x.size(0), row_grain(columns), [&](int64_t begin, int64_t end) {
    RAREFY_ISA_CALL(scale_rows_from_bf16, in, y, columns, scale.data(), begin, end);
  });
  return out;
}

std::vector<float> weight_gradient_scale(const std::vector<float>& w_scale, const at::Tensor& x_scale) {
  const auto s = x_scale.item<float>();
  auto out = w_scale;
  for (auto& value : out) {
    value = s / value;
  }
  return out;
}

bool has_exact_integer_products() {
  static const bool answer = processor_has_dot_products();
  return answer;
}

}  // namespace rarefy::ops
