#include <ATen/ops/empty.h>
#include <rarefy/ops/mask.h>
#include <torch/library.h>

#include <cstring>

#include "ops/cpu/dense.h"
#include "ops/cpu/pack_bits.h"
#include "ops/mask_checks.h"

namespace rarefy::ops {
namespace {

at::Tensor pack_mask_cpu(const at::Tensor& kept) {
  TORCH_CHECK_TYPE(kept.scalar_type() == at::kBool, "[pack_mask] kept must be bool, got ", kept.scalar_type());
  const auto flat = kept.contiguous();
  return pack_bits(reinterpret_cast<const uint8_t*>(flat.const_data_ptr<bool>()), flat.numel());
}

at::Tensor unpack_mask_cpu(const at::Tensor& mask, c10::SymIntArrayRef size) {
  check_unpack_mask(mask, size);
  const auto packed = mask.contiguous();
  const auto out = at::empty(C10_AS_INTARRAYREF_SLOW(size), mask.options().dtype(at::kBool));
  const uint8_t* bits = packed.const_data_ptr<uint8_t>();
  auto* kept = out.data_ptr<bool>();
  parallel_words(out.numel(), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; i += 8) {
      const uint8_t byte = bits[i / 8];
      for (int64_t j = i; j < std::min(i + 8, end); ++j) {
        kept[j] = (byte >> (j - i) & 1) != 0;
      }
    }
  });
  return out;
}

}  // namespace

TORCH_LIBRARY_IMPL(rarefy, CPU, m) {
  m.impl("pack_mask", &pack_mask_cpu);
  m.impl("unpack_mask", &unpack_mask_cpu);
}

}  // namespace rarefy::ops
