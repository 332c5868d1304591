#include "pruning/nm_excess_simd.h"

#include "ops/cpu/simd.h"

namespace rarefy::cpu::RAREFY_ISA {

void add_excess(const float* values, float threshold, float* sums, int64_t n) {
  const Vec zero(0.0f), least(threshold);
  int64_t i = 0;
  for (; i + Vec::size <= n; i += Vec::size) {
    (Vec::load(sums + i) + max(Vec::load(values + i) - least, zero)).store(sums + i);
  }
  for (; i < n; ++i) {
    const float excess = values[i] - threshold;
    sums[i] += excess > 0.0f ? excess : 0.0f;
  }
}

}  // namespace rarefy::cpu::RAREFY_ISA
