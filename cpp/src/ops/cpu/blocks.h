// Tensors as rows and blocks of shared scales: what the CPU kernels of formats walk over.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty_like.h>

#include <vector>

#include "ops/allocate.h"
#include "ops/cpu/dense.h"
#include "ops/cpu/formats_simd.h"
#include "ops/formats_checks.h"

namespace rarefy::ops {

/// x as memory in which blocks lie one after the other, and where the result goes.
struct Arranged {
  at::Tensor in;      // dense; rows along the axis of blocks where there are any
  at::Tensor out;     // the same strides, to be written
  at::Tensor result;  // x's memory format; shares memory with `out` where that is possible
  cpu::Blocks blocks;
  int64_t moved = -1;  // the axis that is last in `in`; -1: none was moved

  at::Tensor finish() {
    const auto back = moved < 0 ? out : out.movedim(-1, moved);
    if (!result.is_alias_of(out)) {
      result.copy_(back);
    }
    return result;
  }
  /// Parameters in the order of the blocks, contiguous.
  at::Tensor ordered(const at::Tensor& parameter) const {
    return (moved < 0 || parameter.dim() == 0 ? parameter : parameter.movedim(moved, -1)).contiguous();
  }
};

/// How often blocks repeat: the number of scales.
inline int64_t count_of(const std::vector<c10::SymInt>& sizes) {
  int64_t count = 1;
  for (const auto& size : sizes) {
    count *= size.expect_int();
  }
  return count;
}

/// Without `write` there is no result: the range alone is read. `logical`: in the order of x's axes, whatever its strides.
inline Arranged arrange(const at::Tensor& given, const Sharing& sharing, bool write = true, bool logical = false) {
  const auto x = logical ? given.contiguous() : given;
  const auto type = layout_of(x, -1).type;
  const int64_t n = std::max<int64_t>(x.numel(), 1);
  Arranged a;
  if (sharing.block.empty()) {
    a.in = dense(x);
    a.result = a.out = write ? empty_for(a.in) : at::Tensor();
    const auto layout = layout_of(a.in, sharing.axis);
    const bool columns = layout.inner == 1 && layout.channels > 1;
    const int64_t length = columns ? layout.channels : layout.inner;
    a.blocks = {type, std::max<int64_t>(length, 1), std::max<int64_t>(length, 1), 1, 1, 1, 1, layout.channels, columns};
    return a;
  }
  const auto moved = x.movedim(sharing.axis, -1);
  a.moved = sharing.axis;
  a.in = moved.contiguous();
  if (write) {
    a.result = empty_for(dense(x));
    a.out = a.result.movedim(sharing.axis, -1);
    a.out = a.out.is_contiguous() ? a.out : at::empty_like(a.in);
  }
  const int64_t length = x.size(sharing.axis), wide = sharing.block.back().expect_int();
  const int64_t across = (length + wide - 1) / wide, rows = n / length;
  a.blocks = {type, length, std::min(wide, length), across, std::max<int64_t>(rows, 1), rows, 1, 0, false};
  if (sharing.block.size() == 2) {
    const int64_t matrix = x.size(-2), tall = std::min(sharing.block.front().expect_int(), matrix);
    a.blocks.matrix = matrix;
    a.blocks.tall = tall;
    a.blocks.strips = (matrix + tall - 1) / tall;
  }
  a.blocks.period = std::max<int64_t>(rows / a.blocks.matrix * a.blocks.strips, 1);
  return a;
}

/// Elements [first, second) of strip s.
inline std::pair<int64_t, int64_t> strip_elements(const cpu::Blocks& b, int64_t strip) {
  const int64_t first = strip / b.strips * b.matrix, within = strip % b.strips * b.tall;
  return {(first + within) * b.length, (first + std::min(within + b.tall, b.matrix)) * b.length};
}

/// The index of the scale of element i: what for_each_block computes, for plain loops.
inline int64_t scale_index(const cpu::Blocks& b, int64_t i) {
  if (b.columns) {
    return i % b.length;
  }
  const int64_t row = i / b.length;
  const int64_t strip = row / b.matrix * b.strips + row % b.matrix / b.tall;
  return strip % b.period * b.across + i % b.length / b.wide;
}

/// out[i] = each(in[i], scale index, i), plain: float64, and stochastic rounding.
template <typename T, typename Each>
void plain_loop(const Arranged& a, const at::Tensor& in, const at::Tensor& out, const Each& each) {
  const T* x = in.const_data_ptr<T>();
  T* y = out.data_ptr<T>();
  at::parallel_for(0, in.numel(), kGrain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      y[i] = each(x[i], static_cast<size_t>(scale_index(a.blocks, i)), i);
    }
  });
}

}  // namespace rarefy::ops
