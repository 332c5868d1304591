#include "mask_slices.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>

#include "ops/mask_checks.h"
#include "slices.h"

namespace rarefy::pruning {

at::Tensor take_mask(const at::Tensor& mask, at::IntArrayRef sizes, const Kept& kept) {
  const auto packed = mask.cpu().contiguous();
  const auto bits = at::empty(sizes, packed.options());  // one byte per element
  const auto* from = packed.const_data_ptr<uint8_t>();
  auto* bytes = bits.mutable_data_ptr<uint8_t>();
  for (int64_t i = 0; i < bits.numel(); ++i) {
    bytes[i] = static_cast<uint8_t>(from[i / 8] >> (i % 8) & 1);
  }
  const auto left = take(bits, kept).contiguous();
  const auto result = at::zeros({ops::mask_bytes(left.numel())}, packed.options());
  const auto* read = left.const_data_ptr<uint8_t>();
  auto* to = result.mutable_data_ptr<uint8_t>();
  for (int64_t i = 0; i < left.numel(); ++i) {
    to[i / 8] = static_cast<uint8_t>(to[i / 8] | read[i] << (i % 8));
  }
  return result.to(mask.device());
}

}  // namespace rarefy::pruning
