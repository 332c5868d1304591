#include <rarefy/ops/integer.h>
#include <torch/library.h>

#include <atomic>
#include <cmath>
#include <limits>
#include <vector>

#include "ops/allocate.h"
#include "ops/cpu/dense.h"
#include "ops/cpu/fake_quantize_kernel.h"
#include "ops/cpu/integer_kernel.h"
#include "ops/cpu/integer_simd.h"
#include "ops/integer_checks.h"

namespace rarefy::ops {
namespace {

std::tuple<at::Tensor, at::Tensor, at::Tensor> quantize_mask_cpu(const at::Tensor& x_, const at::Tensor& scale,
                                                                 const at::Tensor& zero_point,
                                                                 std::optional<int64_t> axis, int64_t qmin,
                                                                 int64_t qmax,
                                                                 const std::optional<at::Tensor>& multiplier) {
  constexpr const char* function = "quantize_mask";
  const int64_t resolved = check_quantize_mask(function, x_, scale, zero_point, axis, qmin, qmax, multiplier);
  // float64 has no integer execution of its own: its integers are those of the value rounded to float32.
  const auto x = dense(x_.scalar_type() == at::kDouble ? x_.to(at::kFloat) : x_);
  const auto scales = floats(scale);
  const auto zeros = floats(zero_point);
  for (size_t i = 0; i < scales.size(); ++i) {
    TORCH_CHECK_VALUE(std::isfinite(scales[i]) && scales[i] > 0, "[", function,
                      "] scale must be finite and positive, got ", scales[i], " at index ", i);
    TORCH_CHECK_VALUE(zeros[i] >= static_cast<float>(qmin) && zeros[i] <= static_cast<float>(qmax), "[", function,
                      "] zero_point must be within [", qmin, ", ", qmax, "], got ", zeros[i], " at index ", i);
  }
  const auto multipliers = multiplier.has_value() ? floats(*multiplier) : std::vector<float>();
  auto q = empty_for(x, qmin < 0 ? at::kChar : at::kByte);
  auto mask = empty_mask(x);
  const auto layout = layout_of(x, resolved);
  const cpu::Grid grid{scales.data(), zeros.data(), static_cast<float>(qmin), static_cast<float>(qmax)};
  const void* values = x.const_data_ptr();
  auto* bytes = static_cast<uint8_t*>(q.data_ptr());
  auto* bits = mask.data_ptr<uint8_t>();
  std::atomic<bool> is_number{true};
  parallel_words(x.numel(), [&](int64_t begin, int64_t end) {
    if (!RAREFY_ISA_CALL(quantize_mask, values, bytes, bits, layout, grid,
                         multipliers.empty() ? nullptr : multipliers.data(), begin, end)) {
      is_number.store(false, std::memory_order_relaxed);
    }
  });
  auto used = scale.to(at::kFloat, /*non_blocking=*/false, /*copy=*/true, at::MemoryFormat::Contiguous);
  if (!is_number.load()) {
    used.fill_(std::numeric_limits<float>::quiet_NaN());
  }
  return {q, mask, used};
}

}  // namespace

TORCH_LIBRARY_IMPL(rarefy, CPU, m) { m.impl("quantize_mask", &quantize_mask_cpu); }

}  // namespace rarefy::ops
