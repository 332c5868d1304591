#include <rarefy/ops/mask.h>
#include <torch/library.h>

#include "ops/cpu/dense.h"
#include "ops/cpu/mask_simd.h"
#include "ops/cpu/strided_range.h"
#include "ops/mask_checks.h"

namespace rarefy::ops {
namespace {

/// Clears elements of a strided x where the bit of their logical position is 0.
template <typename T>
void apply_strided(const at::Tensor& x, const uint8_t* mask) {
  const StridedRange range(x);
  T* values = static_cast<T*>(x.data_ptr());
  at::parallel_for(0, x.numel(), kGrain, [&](int64_t begin, int64_t end) {
    range.walk(values, begin, end, [&](T* p, int64_t i) {
      if ((mask[i / 8] >> (i % 8) & 1) == 0) {
        *p = 0;
      }
    });
  });
}

void apply_mask_cpu(at::Tensor& x, const at::Tensor& mask) {
  check_apply_mask(x, mask);
  const auto packed = mask.contiguous();
  const uint8_t* bits = packed.const_data_ptr<uint8_t>();
  const int bytes = static_cast<int>(x.element_size());
  if (x.is_contiguous()) {
    void* values = x.data_ptr();
    parallel_words(x.numel(),
                   [&](int64_t begin, int64_t end) { RAREFY_ISA_CALL(apply_mask, values, bits, bytes, begin, end); });
  } else if (bytes == 2) {
    apply_strided<uint16_t>(x, bits);
  } else if (bytes == 4) {
    apply_strided<uint32_t>(x, bits);
  } else {
    apply_strided<uint64_t>(x, bits);
  }
}

}  // namespace

TORCH_LIBRARY_IMPL(rarefy, CPU, m) { m.impl("apply_mask_", &apply_mask_cpu); }

}  // namespace rarefy::ops
