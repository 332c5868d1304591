#include "ops/cpu/block_scales.h"

#include <ATen/ops/empty.h>

namespace rarefy::ops {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();

/// Ranges of whole tensors and channels: rows in pieces, so that one long row has work for every thread.
void ranges_of_rows(const at::Tensor& rows, int64_t channels, float* low, float* high) {
  constexpr int64_t kPiece = 16384;
  if (rows.numel() == 0) {
    return;
  }
  const int64_t length = rows.numel() / channels, across = (length + kPiece - 1) / kPiece;
  const cpu::Blocks blocks{
      layout_of(rows, -1).type, length, std::min(kPiece, length), across, channels, channels, 1, channels,
      /*columns=*/false};
  const auto count = static_cast<size_t>(channels * across);
  std::vector<float> lows(count, kInfinity), highs(count, -kInfinity);
  const void* x = rows.const_data_ptr();
  const auto start = [&](int64_t tile) { return tile / across * length + tile % across * blocks.wide; };
  at::parallel_for(0, channels * across, std::max<int64_t>(1, kPiece / blocks.wide), [&](int64_t first, int64_t last) {
    RAREFY_ISA_CALL(block_ranges, x, blocks, lows.data(), highs.data(), start(first), start(last));
  });
  for (size_t i = 0; i < count; ++i) {
    const auto channel = i / static_cast<size_t>(across);
    low[channel] = std::min(low[channel], lows[i]);
    high[channel] = std::max(high[channel], highs[i]);
  }
}

/// low and high of every block in the order of the blocks; their shape is the scales' with the blocked axis last.
std::pair<std::vector<float>, std::vector<float>> ordered_ranges(const at::Tensor& given, const Sharing& sharing) {
  const auto x = given.scalar_type() == at::kDouble ? given.to(at::kFloat) : given;
  const auto count = static_cast<size_t>(count_of(scale_sizes(x, sharing)));
  std::vector<float> low(count, kInfinity), high(count, -kInfinity);
  if (sharing.block.empty()) {
    const auto rows = sharing.axis < 0 ? dense(x) : x.movedim(sharing.axis, 0).contiguous();
    ranges_of_rows(rows, static_cast<int64_t>(count), low.data(), high.data());
    return {low, high};
  }
  const auto a = arrange(x, sharing, /*write=*/false);
  for_tiles(a, [&](int64_t, int64_t, int64_t begin, int64_t end) {
    RAREFY_ISA_CALL(block_ranges, a.in.const_data_ptr(), a.blocks, low.data(), high.data(), begin, end);
  });
  return {low, high};
}

/// Values in the order of the blocks as a tensor in the shape of the scales.
template <typename T>
at::Tensor shaped(const std::vector<T>& values, const at::Tensor& x, const Sharing& sharing, at::ScalarType type) {
  const auto symbolic = scale_sizes(x, sharing);
  std::vector<int64_t> sizes;
  for (const auto& size : symbolic) {
    sizes.push_back(size.expect_int());
  }
  const bool moved = !sharing.block.empty();
  if (moved) {
    const auto axis = sizes[static_cast<size_t>(sharing.axis)];
    sizes.erase(sizes.begin() + sharing.axis);
    sizes.push_back(axis);
  }
  auto tensor = at::empty(sizes, x.options().dtype(type));
  std::copy(values.begin(), values.end(), tensor.data_ptr<T>());
  return moved ? tensor.movedim(-1, sharing.axis).contiguous() : tensor;
}

}  // namespace

std::tuple<at::Tensor, at::Tensor> range_of(const at::Tensor& x, const Sharing& sharing) {
  const auto [low, high] = ordered_ranges(x, sharing);
  return {shaped(low, x, sharing, at::kFloat), shaped(high, x, sharing, at::kFloat)};
}

FoundScales scales_of(const at::Tensor& x, const Sharing& sharing, const ScaleRule& rule) {
  const auto [low, high] = ordered_ranges(x, sharing);
  std::vector<float> scale(low.size());
  std::vector<int32_t> zero_point(low.size());
  for (size_t i = 0; i < low.size(); ++i) {
    const auto q = apply_rule(rule, low[i], high[i]);
    scale[i] = q.scale;
    zero_point[i] = q.zero_point;
  }
  return {shaped(scale, x, sharing, at::kFloat), shaped(zero_point, x, sharing, at::kInt)};
}

}  // namespace rarefy::ops
