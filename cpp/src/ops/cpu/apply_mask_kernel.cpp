#include <rarefy/ops/mask.h>
#include <torch/library.h>

#include "ops/cpu/dense.h"
#include "ops/cpu/mask_simd.h"
#include "ops/mask_checks.h"

namespace rarefy::ops {
namespace {

/// Clears elements of a strided x where the bit of their logical position is 0.
template <typename T>
void apply_strided(const at::Tensor& x, const uint8_t* mask) {
  // Neighbouring dimensions that are walked with one stride are one dimension.
  std::vector<int64_t> sizes, strides;
  for (int64_t d = 0; d < x.dim(); ++d) {
    if (x.size(d) == 1) {
      continue;
    }
    if (!sizes.empty() && strides.back() == x.size(d) * x.stride(d)) {
      sizes.back() *= x.size(d);
      strides.back() = x.stride(d);
    } else {
      sizes.push_back(x.size(d));
      strides.push_back(x.stride(d));
    }
  }
  T* values = static_cast<T*>(x.data_ptr());
  const size_t dims = sizes.size();
  at::parallel_for(0, x.numel(), kGrain, [&](int64_t begin, int64_t end) {
    std::vector<int64_t> index(dims);
    int64_t offset = 0;
    for (size_t d = dims, rest = static_cast<size_t>(begin); d-- > 0; rest /= static_cast<size_t>(sizes[d])) {
      index[d] = static_cast<int64_t>(rest % static_cast<size_t>(sizes[d]));
      offset += index[d] * strides[d];
    }
    const int64_t run = sizes[dims - 1], step = strides[dims - 1];
    for (int64_t i = begin; i < end;) {
      const int64_t run_end = std::min(end, i + run - index[dims - 1]);
      for (T* p = values + offset; i < run_end; ++i, p += step) {
        if ((mask[i / 8] >> (i % 8) & 1) == 0) {
          *p = 0;
        }
      }
      offset -= index[dims - 1] * step;
      index[dims - 1] = 0;
      for (size_t d = dims - 1; d-- > 0;) {
        offset += strides[d];
        if (++index[d] < sizes[d]) {
          break;
        }
        offset -= sizes[d] * strides[d];
        index[d] = 0;
      }
    }
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
