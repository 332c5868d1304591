// Ranges of blocks, and scales from them, on the CPU.
#pragma once

#include <tuple>
#include <vector>

#include "ops/cpu/blocks.h"
#include "ops/scale_rules.h"

namespace rarefy::ops {

/// The smallest and largest finite value of what shares a scale, float32, in the shape of the scales; (inf, -inf) where there
/// is none. float64 is rounded to float32 first.
std::tuple<at::Tensor, at::Tensor> range_of(const at::Tensor& x, const Sharing& sharing);

struct FoundScales {
  at::Tensor scale, zero_point;  // float32 and int32, in the shape of the scales
};
FoundScales scales_of(const at::Tensor& x, const Sharing& sharing, const ScaleRule& rule);

/// Whether a block is read twice out of the caches: its range first, then its values.
inline bool is_local(const at::Tensor& x, const Sharing& sharing) {
  constexpr int64_t kLargest = int64_t{1} << 16;
  if (sharing.block.empty()) {
    return false;
  }
  int64_t elements = std::min(sharing.block.back().expect_int(), x.size(sharing.axis));
  if (sharing.block.size() == 2) {  // a whole strip of rows is walked over
    elements = x.size(-1) * std::min(sharing.block.front().expect_int(), x.size(-2));
  }
  return elements <= kLargest;
}

/// Calls walk(origin, tiles, begin, end) in parallel: elements [begin, end) hold the blocks [origin, origin + tiles) entirely.
template <typename Walk>
void for_tiles(const Arranged& a, const Walk& walk) {
  constexpr int64_t kChunk = 8192;  // elements that stay in the first caches
  const auto& b = a.blocks;
  const int64_t n = a.in.numel(), rows = n / b.length;
  if (n == 0) {
    return;
  }
  if (b.tall == 1) {
    const int64_t tiles = rows * b.across, together = std::max<int64_t>(1, kChunk / b.wide);
    const auto start = [&](int64_t tile) { return tile / b.across * b.length + tile % b.across * b.wide; };
    at::parallel_for(0, tiles, std::max<int64_t>(1, kGrain / b.wide), [&](int64_t first, int64_t last) {
      for (int64_t tile = first; tile < last; tile += together) {
        const int64_t next = std::min(tile + together, last);
        walk(tile, next - tile, start(tile), start(next));
      }
    });
    return;
  }
  const int64_t strips = rows / b.matrix * b.strips;
  at::parallel_for(0, strips, std::max<int64_t>(1, kGrain / (b.tall * b.length)), [&](int64_t first, int64_t last) {
    for (int64_t strip = first; strip < last; ++strip) {
      const auto [begin, end] = strip_elements(b, strip);
      walk(strip * b.across, b.across, begin, end);
    }
  });
}

/// Calls cast(scales * factor, zero points, blocks, begin, end) for stretches of whole blocks, whose scales follow from their
/// range by the rule: x is read from memory once.
template <typename Cast>
void with_scales_of(const Arranged& a, const ScaleRule& rule, const Cast& cast, float factor = 1.0f) {
  constexpr float infinity = std::numeric_limits<float>::infinity();
  const void* x = a.in.const_data_ptr();
  for_tiles(a, [&](int64_t origin, int64_t tiles, int64_t begin, int64_t end) {
    const auto count = static_cast<size_t>(tiles);
    std::vector<float> low(count, infinity), high(count, rule.needs_largest_alone() ? 0.0f : -infinity);
    auto blocks = a.blocks;
    blocks.origin = origin;
    if (rule.needs_largest_alone()) {
      RAREFY_ISA_CALL(block_largest, x, blocks, high.data(), begin, end);
    } else {
      RAREFY_ISA_CALL(block_ranges, x, blocks, low.data(), high.data(), begin, end);
    }
    for (size_t k = 0; k < count; ++k) {
      const auto q = apply_rule(rule, rule.needs_largest_alone() ? -high[k] : low[k], high[k]);
      low[k] = q.scale * factor;
      high[k] = static_cast<float>(q.zero_point);
    }
    cast(low.data(), high.data(), blocks, begin, end);
  });
}

// --- Double quantization: scales in 8 bits ------------------------------------------------------------------------------

/// The mean in float64, summed in order, rounded once.
inline float double_quantized_mean(const float* values, int64_t n) {
  double sum = 0.0;
  for (int64_t i = 0; i < n; ++i) {
    sum += static_cast<double>(values[i]);
  }
  return n == 0 ? 0.0f : static_cast<float>(sum / static_cast<double>(n));
}
inline float double_quantized_step(const float* values, int64_t begin, int64_t end, float mean) {
  float largest = 0.0f;
  for (int64_t i = begin; i < end; ++i) {
    largest = std::max(largest, std::abs(values[i] - mean));
  }
  return scale_of_largest(largest, 127.0);
}
inline int8_t double_quantized(float value, float mean, float step) {
  return static_cast<int8_t>(std::clamp(std::nearbyint((value - mean) / step), -127.0f, 127.0f));
}
/// A scale stays positive.
inline float double_dequantized(int8_t q, float mean, float step) {
  return std::max(static_cast<float>(q) * step + mean, kSmallestScale);
}

}  // namespace rarefy::ops
