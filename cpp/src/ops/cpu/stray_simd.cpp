#include "ops/cpu/stray_simd.h"

#include "ops/cpu/simd.h"

namespace rarefy::cpu::RAREFY_ISA {
namespace {

constexpr int64_t kWord = 64;
constexpr int64_t kBlock = 16 * kWord;  // elements between two looks at what was gathered

/// The bits, without the sign, that are set in any pruned element of the whole words [begin, end). Written so that the
/// compiler turns each part of a word into vector operations.
template <typename T>
bool has_stray(const T* x, const uint8_t* mask, int64_t begin, int64_t end) {
  constexpr int bits = 8 * static_cast<int>(sizeof(T));
  T seen[bits] = {};
  for (int64_t i = begin; i < end; i += kWord) {
    uint64_t word;
    memcpy(&word, mask + i / 8, sizeof word);
    if (word == ~uint64_t{0}) {
      continue;
    }
    for (int part = 0; part < kWord; part += bits) {
      const T kept = static_cast<T>(word >> part);
      const T* p = x + i + part;
      for (int j = 0; j < bits; ++j) {
        seen[j] = static_cast<T>(
            seen[j] | (p[j] & static_cast<T>((kept & static_cast<T>(T{1} << j)) != 0 ? T{0} : static_cast<T>(~T{0}))));
      }
    }
  }
  T all = 0;
  for (int j = 0; j < bits; ++j) {
    all = static_cast<T>(all | seen[j]);
  }
  return static_cast<T>(all << 1) != 0;
}

template <typename T>
Stray count_range(const T* x, const uint8_t* mask, int64_t begin, int64_t end) {
  Stray result = {0, -1};
  for (int64_t block = begin; block < end; block += kBlock) {
    const int64_t stop = block + kBlock < end ? block + kBlock : end;
    const int64_t whole = block + (stop - block) / kWord * kWord;
    const bool found = has_stray(x, mask, block, whole);
    for (int64_t i = found ? block : whole; i < stop; ++i) {
      if ((mask[i / 8] >> (i % 8) & 1) == 0 && static_cast<T>(x[i] << 1) != 0) {
        result.first = result.count == 0 ? i : result.first;
        ++result.count;
      }
    }
  }
  return result;
}

}  // namespace

Stray count_stray(const void* x, const uint8_t* mask, int element_bytes, int64_t begin, int64_t end) {
  switch (element_bytes) {
    case 2:
      return count_range(static_cast<const uint16_t*>(x), mask, begin, end);
    case 4:
      return count_range(static_cast<const uint32_t*>(x), mask, begin, end);
    default:
      return count_range(static_cast<const uint64_t*>(x), mask, begin, end);
  }
}

}  // namespace rarefy::cpu::RAREFY_ISA
