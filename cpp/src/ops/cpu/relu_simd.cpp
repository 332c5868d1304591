#include "ops/cpu/relu_simd.h"

#include "ops/cpu/simd.h"

namespace rarefy::cpu::RAREFY_ISA {
namespace {

constexpr int kWord = 64;
constexpr uint32_t kAllLanes = static_cast<uint32_t>((uint64_t{1} << Vec::size) - 1);

inline uint32_t positive(Vec x) { return ~within(x, Vec(-__builtin_inff()), Vec(0.0f)) & kAllLanes; }
/// The bound first: a NaN in x then comes through.
inline Vec rectified(Vec x) { return max(Vec(0.0f), x); }

template <typename T>
void relu_mask_range(const T* x, T* y, uint8_t* mask, int64_t begin, int64_t end) {
  int64_t i = begin;
  for (; i + kWord <= end; i += kWord) {
    uint64_t word = 0;
    for (int lane = 0; lane < kWord; lane += Vec::size) {
      const Vec value = Vec::load(x + i + lane);
      rectified(value).store(y + i + lane);
      word |= static_cast<uint64_t>(positive(value)) << lane;
    }
    memcpy(mask + i / 8, &word, sizeof word);
  }
  if (i < end) {
    uint64_t word = 0;
    for (int lane = 0; i + lane < end; lane += Vec::size) {
      const int count = end - i - lane < Vec::size ? static_cast<int>(end - i - lane) : Vec::size;
      const Vec value = count == Vec::size ? Vec::load(x + i + lane) : Vec::load_first(x + i + lane, count, 0.0f);
      count == Vec::size ? rectified(value).store(y + i + lane) : rectified(value).store_first(y + i + lane, count);
      word |= static_cast<uint64_t>(positive(value)) << lane;
    }
    memcpy(mask + i / 8, &word, sizeof word);
  }
}

}  // namespace

void relu_mask(FloatType type, const void* x, void* y, uint8_t* mask, int64_t begin, int64_t end) {
  RAREFY_FOR_FLOAT_TYPE(type, T, relu_mask_range(static_cast<const T*>(x), static_cast<T*>(y), mask, begin, end))
}

}  // namespace rarefy::cpu::RAREFY_ISA
