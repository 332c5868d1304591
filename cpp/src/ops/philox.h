// Philox4x32-10 (Salmon et al., 2011): random numbers of a place, not of a sequence.
#pragma once

#include <cstdint>

namespace rarefy::ops {

/// The four 32-bit numbers of a 128-bit counter under a 64-bit key.
struct Philox {
  uint32_t words[4];

  Philox(uint64_t key, uint64_t low, uint64_t high)
      : words{static_cast<uint32_t>(low), static_cast<uint32_t>(low >> 32), static_cast<uint32_t>(high),
              static_cast<uint32_t>(high >> 32)} {
    auto k0 = static_cast<uint32_t>(key), k1 = static_cast<uint32_t>(key >> 32);
    for (int round = 0; round < 10; ++round) {
      const uint64_t p0 = uint64_t{0xd2511f53u} * words[0], p1 = uint64_t{0xcd9e8d57u} * words[2];
      const uint32_t next[4] = {static_cast<uint32_t>(p1 >> 32) ^ words[1] ^ k0, static_cast<uint32_t>(p1),
                                static_cast<uint32_t>(p0 >> 32) ^ words[3] ^ k1, static_cast<uint32_t>(p0)};
      for (int i = 0; i < 4; ++i) {
        words[i] = next[i];
      }
      k0 += 0x9e3779b9u;
      k1 += 0xbb67ae85u;
    }
  }
};

/// A multiple of 2^-24 in [0, 1) for element i of call `call`.
inline float uniform_at(uint64_t seed, uint64_t call, uint64_t i) {
  return static_cast<float>(Philox(seed, i / 4, call).words[i % 4] >> 8) * 0x1p-24f;
}

}  // namespace rarefy::ops
