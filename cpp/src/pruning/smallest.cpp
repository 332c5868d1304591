#include "pruning/smallest.h"

#include <algorithm>
#include <cstring>
#include <vector>

namespace rarefy::pruning {
namespace {

constexpr int64_t kFew = 4096;  // numbers that are partitioned sooner than 2^16 counters are cleared

uint32_t bits_of(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits & 0x7fffffffU;  // -0 is 0
}

/// The threshold is the largest score that is pruned; of its equals the first are.
template <typename T>
void write(const T* scores, int64_t n, T threshold, int64_t equal_pruned, uint8_t* keep) {
  for (int64_t i = 0; i < n; ++i) {
    const bool equal = scores[i] == threshold;
    const bool pruned = scores[i] < threshold || (equal && equal_pruned > 0);
    equal_pruned -= equal ? 1 : 0;
    keep[i] = pruned ? 0 : 1;
  }
}

template <typename T>
void by_partition(const T* scores, int64_t n, int64_t k, uint8_t* keep) {
  std::vector<T> copy(scores, scores + n);
  std::nth_element(copy.begin(), copy.begin() + (k - 1), copy.end());
  const T threshold = copy[static_cast<size_t>(k - 1)];
  const auto below = std::count_if(scores, scores + n, [threshold](T s) { return s < threshold; });
  write(scores, n, threshold, k - below, keep);
}

bool is_trivial(int64_t n, int64_t k, uint8_t* keep) {
  if (k > 0 && k < n) {
    return false;
  }
  std::memset(keep, k <= 0 ? 1 : 0, static_cast<size_t>(n));
  return true;
}

}  // namespace

void keep_all_but_smallest(const float* scores, int64_t n, int64_t k, uint8_t* keep) {
  if (is_trivial(n, k, keep)) {
    return;
  }
  if (n <= kFew) {
    by_partition(scores, n, k, keep);
    return;
  }
  // Bits of floats that are not negative sort as the floats do: 16 of them at a time.
  std::vector<int64_t> counts(1U << 16U, 0);
  for (int64_t i = 0; i < n; ++i) {
    ++counts[bits_of(scores[i]) >> 16U];
  }
  int64_t left = k;
  uint32_t high = 0;
  while (counts[high] < left) {
    left -= counts[high++];
  }
  std::fill(counts.begin(), counts.end(), 0);
  for (int64_t i = 0; i < n; ++i) {
    const uint32_t bits = bits_of(scores[i]);
    if (bits >> 16U == high) {
      ++counts[bits & 0xffffU];
    }
  }
  uint32_t low = 0;
  while (counts[low] < left) {
    left -= counts[low++];
  }
  const uint32_t bits = high << 16U | low;
  float threshold;
  std::memcpy(&threshold, &bits, sizeof threshold);
  write(scores, n, threshold, left, keep);
}

void keep_all_but_smallest(const double* scores, int64_t n, int64_t k, uint8_t* keep) {
  if (!is_trivial(n, k, keep)) {
    by_partition(scores, n, k, keep);
  }
}

}  // namespace rarefy::pruning
