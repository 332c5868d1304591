#pragma once

#include <ATen/ops/empty.h>

#include <bit>
#include <cstring>

#include "ops/cpu/dense.h"
#include "ops/mask_checks.h"

namespace rarefy::ops {

/// The packed mask of n bytes that are 0 or 1.
inline at::Tensor pack_bits(const uint8_t* kept, int64_t n) {
  static_assert(std::endian::native == std::endian::little, "element 8 * i + j is bit j of byte i");
  auto out = at::empty({mask_bytes(n)}, at::kByte);
  auto* bytes = out.data_ptr<uint8_t>();
  parallel_words(n, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; i += kWord) {
      uint64_t word = 0;
      for (int64_t j = i; j < std::min(i + kWord, end); j += 8) {
        uint64_t eight = 0;
        std::memcpy(&eight, kept + j, static_cast<size_t>(std::min<int64_t>(8, end - j)));
        word |= (eight * 0x0102040810204080u >> 56) << (j - i);  // the low bits of eight bytes, side by side
      }
      std::memcpy(bytes + i / 8, &word, sizeof word);
    }
  });
  return out;
}

}  // namespace rarefy::ops
