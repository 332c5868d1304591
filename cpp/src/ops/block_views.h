// Blocks by torch's operators, for any device: x cut into blocks and put together again, scales spread over their elements.
#pragma once

#include <ATen/ops/constant_pad_nd.h>
#include <ATen/ops/full_like.h>
#include <ATen/ops/where.h>

#include "ops/formats_checks.h"

namespace rarefy::ops {

/// 2^e in float32 for whole numbers e in [-127, 127], from their bits: exact everywhere.
inline at::Tensor powers_of_two(const at::Tensor& e) {
  const auto normal = (e.to(at::kInt).clamp_min(-126) + 127).mul(1 << 23).view(at::kFloat);
  return at::where(e.lt(-126), at::full_like(normal, 0x1p-127), normal);
}

/// x as [blocks, elements of a block], blocks in the order of the scales; short blocks are filled up with `fill`. Back again by
/// from_blocks.
inline at::Tensor to_blocks(const at::Tensor& x, const Sharing& sharing, double fill) {
  if (sharing.axis < 0) {
    return x.reshape({1, -1});
  }
  if (sharing.block.empty()) {
    const auto channels = x.sym_size(sharing.axis);
    return x.movedim(sharing.axis, 0)
        .reshape_symint({channels, channels == 0 ? c10::SymInt(0) : x.sym_numel() / channels});
  }
  const auto moved = x.movedim(sharing.axis, -1);
  const auto &wide = sharing.block.back(), &length = moved.sym_size(-1);
  const auto across = (length + wide - 1) / wide;
  if (sharing.block.size() == 1) {
    const auto padded = at::constant_pad_nd_symint(moved, {0, across * wide - length}, fill);
    // The scales have x's order of axes.
    auto sizes = moved.sym_sizes().vec();
    sizes.back() = across;
    sizes.push_back(wide);
    return padded.reshape_symint(sizes).movedim(-2, sharing.axis).reshape_symint({-1, wide});
  }
  const auto &tall = sharing.block.front(), &rows = moved.sym_size(-2);
  const auto down = (rows + tall - 1) / tall;
  const auto padded = at::constant_pad_nd_symint(moved, {0, across * wide - length, 0, down * tall - rows}, fill);
  return padded.reshape_symint({-1, down, tall, across, wide}).transpose(2, 3).reshape_symint({-1, tall * wide});
}

inline at::Tensor from_blocks(const at::Tensor& blocks, const at::Tensor& x, const Sharing& sharing) {
  if (sharing.axis < 0) {
    return blocks.reshape_symint(x.sym_sizes());
  }
  if (sharing.block.empty()) {
    return blocks.reshape_symint(x.movedim(sharing.axis, 0).sym_sizes()).movedim(0, sharing.axis);
  }
  const auto moved = x.movedim(sharing.axis, -1);
  const auto &wide = sharing.block.back(), &length = moved.sym_size(-1);
  const auto across = (length + wide - 1) / wide;
  if (sharing.block.size() == 1) {
    auto sizes = x.sym_sizes().vec();
    sizes[static_cast<size_t>(sharing.axis)] = across;
    sizes.push_back(wide);
    auto padded_sizes = moved.sym_sizes().vec();
    padded_sizes.back() = across * wide;
    return blocks.reshape_symint(sizes)
        .movedim(sharing.axis, -2)
        .reshape_symint(padded_sizes)
        .narrow_symint(-1, 0, length)
        .movedim(-1, sharing.axis);
  }
  const auto &tall = sharing.block.front(), &rows = moved.sym_size(-2);
  const auto down = (rows + tall - 1) / tall;
  auto sizes = x.sym_sizes().vec();
  sizes[sizes.size() - 2] = down * tall;
  sizes[sizes.size() - 1] = across * wide;
  return blocks.reshape_symint({-1, down, across, tall, wide})
      .transpose(2, 3)
      .reshape_symint(sizes)
      .narrow_symint(-1, 0, length)
      .narrow_symint(-2, 0, rows);
}

}  // namespace rarefy::ops
