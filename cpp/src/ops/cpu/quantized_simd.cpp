#include "ops/cpu/quantized_simd.h"

#include "ops/cpu/simd.h"
#include "ops/cpu/simd_walk.h"

namespace rarefy::cpu::RAREFY_ISA {
namespace {

/// Calls write(i, count, sum) for vectors of sums.
template <typename Write>
void for_each_sum(const Terms& t, int64_t begin, int64_t end, Write write) {
  const Vec a_scale(t.a_scale), a_zero(t.a_zero_point), b_scale(t.b_scale), b_zero(t.b_zero_point);
  for (int64_t i = begin; i < end; i += Vec::size) {
    const int count = end - i < Vec::size ? static_cast<int>(end - i) : Vec::size;
    const bool whole = count == Vec::size;
    const Vec a = whole ? Vec::load_bytes(t.a + i) : load_bytes_first(t.a + i, count);
    const Vec b = whole ? Vec::load_bytes(t.b + i) : load_bytes_first(t.b + i, count);
    write(i, count, (a - a_zero) * a_scale + (b - b_zero) * b_scale);
  }
}

inline void keep_largest(const uint8_t* x, uint8_t* y, int64_t count) {
  for (int64_t i = 0; i < count; ++i) {
    y[i] = x[i] > y[i] ? x[i] : y[i];
  }
}

}  // namespace

void add_bytes(Terms terms, bool relu, float* y, int64_t begin, int64_t end) {
  const Vec zero(0.0f);
  for_each_sum(terms, begin, end,
               [&](int64_t i, int count, Vec sum) { store_some(relu ? max(zero, sum) : sum, y + i, count); });
}

void add_bytes_to_grid(Terms terms, Grid grid, uint8_t* y, int64_t begin, int64_t end) {
  Parameters p(grid);
  p.set(grid, 0);
  for_each_sum(terms, begin, end, [&](int64_t i, int count, Vec sum) {
    const Vec q = max(p.qmin, min(to_grid(sum, p), p.qmax));
    count == Vec::size ? q.store_bytes(y + i) : q.store_bytes_first(y + i, count);
  });
}

namespace {

/// The part [begin, end) of a window that begins at `start` and lies in an image of `size`.
struct Inside {
  int64_t begin, end;

  Inside(int64_t start, int64_t size, int64_t kernel, int64_t dilation) {
    begin = start < 0 ? (dilation - 1 - start) / dilation : 0;
    const int64_t room = (size - start + dilation - 1) / dilation;
    end = room < kernel ? room : kernel;
  }
};

}  // namespace

void max_pool_bytes(const uint8_t* x, uint8_t* y, Windows w, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row) {
    const uint8_t* image = x + row / w.out_height * w.height * w.width * w.channels;
    const int64_t top = row % w.out_height * w.stride[0] - w.padding[0];
    const Inside rows(top, w.height, w.kernel[0], w.dilation[0]);
    for (int64_t column = 0; column < w.out_width; ++column) {
      uint8_t* out = y + (row * w.out_width + column) * w.channels;
      const int64_t left = column * w.stride[1] - w.padding[1];
      memset(out, 0, static_cast<size_t>(w.channels));
      const Inside columns(left, w.width, w.kernel[1], w.dilation[1]);
      for (int64_t i = rows.begin; i < rows.end; ++i) {
        const int64_t from = top + i * w.dilation[0];
        for (int64_t j = columns.begin; j < columns.end; ++j) {
          const int64_t at = left + j * w.dilation[1];
          keep_largest(image + (from * w.width + at) * w.channels, out, w.channels);
        }
      }
    }
  }
}

}  // namespace rarefy::cpu::RAREFY_ISA
