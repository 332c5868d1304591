#include "ops/cpu/formats_simd.h"

#include "ops/cpu/minifloat_simd.h"

namespace rarefy::cpu::RAREFY_ISA {
namespace {

// --- Walking ------------------------------------------------------------------------------------------------------------

/// Calls run(first, last, scale index) for each stretch of [begin, end) that shares a scale, in order.
template <typename Run>
inline void for_each_block(const Blocks& blocks, int64_t begin, int64_t end, Run run) {
  int64_t row = begin / blocks.length, column = begin - row * blocks.length;
  int64_t across = column / blocks.wide;
  const auto base_of = [&](int64_t r) {
    const int64_t strip = blocks.tall == 1 ? r : r / blocks.matrix * blocks.strips + r % blocks.matrix / blocks.tall;
    return strip % blocks.period * blocks.across;
  };
  int64_t base = base_of(row);
  for (int64_t i = begin; i < end;) {
    int64_t edge = (across + 1) * blocks.wide;
    edge = edge < blocks.length ? edge : blocks.length;
    const int64_t stop = i + (edge - column) < end ? i + (edge - column) : end;
    run(i, stop, base + across - blocks.origin);
    i = stop;
    if (edge == blocks.length) {
      column = across = 0;
      base = base_of(++row);
    } else {
      column = edge;
      ++across;
    }
  }
}

template <typename T>
inline Vec load_some(const T* p, int count) {
  return count == Vec::size ? Vec::load(p) : Vec::load_first(p, count, 0.0f);
}
template <typename T>
inline void store_some(Vec value, T* p, int count) {
  count == Vec::size ? value.store(p) : value.store_first(p, count);
}

/// body(first, count, divisor, index of the first scale, one index for all) for vectors of at most Vec::size elements.
template <typename Body>
inline void for_each_column_vector(const Blocks& blocks, const float* scale, int64_t begin, int64_t end, Body body) {
  Divisor divisor;
  for (int64_t i = begin; i < end;) {
    const int64_t channel = i % blocks.length;
    int64_t count = blocks.length - channel < end - i ? blocks.length - channel : end - i;
    count = count < Vec::size ? count : Vec::size;
    divisor.load(scale + channel, static_cast<int>(count));
    body(i, static_cast<int>(count), divisor, channel);
    i += count;
  }
}

// --- The elements -------------------------------------------------------------------------------------------------------

struct ToTable {
  Table table;
  Vec operator()(Vec y) const {
    const Vec inside = min(Vec(table.values[table.count - 1]), max(Vec(table.values[0]), y));
    Vec value(table.values[0]);
    for (int k = 0; k + 1 < table.count; ++k) {
      value = choose_above(inside, Vec(table.bounds[k]), Vec(table.values[k + 1]), value);
    }
    return value + (inside - inside);  // NaN where inside is; + 0 changes no value, and makes -0 of the table +0
  }
};

template <bool Multiplies, bool Streaming, typename T, typename Cast>
inline void cast_run(const T* x, T* y, int64_t i, int64_t last, const Divisor& d, const Cast& cast) {
  for (; i + Vec::size <= last; i += Vec::size) {
    const Vec out = cast(divide<Multiplies>(Vec::load(x + i), d)) * d.scale;
    Streaming ? out.stream(y + i) : out.store(y + i);
  }
  if (i < last) {
    const int count = static_cast<int>(last - i);
    (cast(divide<Multiplies>(Vec::load_first(x + i, count, 0.0f), d)) * d.scale).store_first(y + i, count);
  }
}

/// Streaming stores need aligned addresses: y is aligned, and so is every block where widths are multiples.
template <typename T>
inline bool may_stream(const T* y, const Blocks& blocks, int64_t begin, int64_t end) {
  const int64_t step = static_cast<int64_t>(kStreamAlignment / sizeof(T));
  const bool one_row = end <= blocks.length;
  return reinterpret_cast<uintptr_t>(y) % kStreamAlignment == 0 && begin % step == 0 &&
         (blocks.across == 1 || blocks.wide % step == 0) && (one_row || blocks.length % step == 0);
}

template <typename T, typename Cast>
void cast_range(const T* x, T* y, const Blocks& blocks, const float* scale, const Cast& cast, bool streaming,
                int64_t begin, int64_t end) {
  if (blocks.columns) {
    for_each_column_vector(blocks, scale, begin, end, [&](int64_t i, int count, const Divisor& d, int64_t) {
      store_some(cast(load_some(x + i, count) / d.scale) * d.scale, y + i, count);
    });
    return;
  }
  streaming = streaming && may_stream(y, blocks, begin, end);
  Divisor d;
  for_each_block(blocks, begin, end, [&](int64_t i, int64_t last, int64_t index) {
    d.set(scale[index]);
    if (streaming) {
      d.multiplies ? cast_run<true, true>(x, y, i, last, d, cast) : cast_run<false, true>(x, y, i, last, d, cast);
    } else {
      d.multiplies ? cast_run<true, false>(x, y, i, last, d, cast) : cast_run<false, false>(x, y, i, last, d, cast);
    }
  });
  if (streaming) {
    stream_fence();
  }
}

template <typename T>
void grid_range(const T* x, T* y, const Blocks& blocks, const float* scale, const float* zero_point, IntegerRange range,
                bool streaming, int64_t begin, int64_t end) {
  const Vec qmin(range.qmin), qmax(range.qmax);
  const auto on_grid = [&](Vec value, Vec s, Vec z) {
    // The bounds come first: a NaN stays.
    return (min(qmax, max(qmin, round_even(value / s) + z)) - z) * s;
  };
  if (blocks.columns) {
    for_each_column_vector(blocks, scale, begin, end, [&](int64_t i, int count, const Divisor& d, int64_t channel) {
      store_some(on_grid(load_some(x + i, count), d.scale, load_some(zero_point + channel, count)), y + i, count);
    });
    return;
  }
  streaming = streaming && may_stream(y, blocks, begin, end);
  for_each_block(blocks, begin, end, [&](int64_t i, int64_t last, int64_t index) {
    const Vec s(scale[index]), z(zero_point[index]);
    for (; i + Vec::size <= last; i += Vec::size) {
      const Vec out = on_grid(Vec::load(x + i), s, z);
      streaming ? out.stream(y + i) : out.store(y + i);
    }
    if (i < last) {
      const int count = static_cast<int>(last - i);
      on_grid(Vec::load_first(x + i, count, 0.0f), s, z).store_first(y + i, count);
    }
  });
  if (streaming) {
    stream_fence();
  }
}

/// The gradient moves as a number here: float32 as it is, 16-bit types through float32 and back, which is exact.
template <typename T, typename Inside>
void clip_range(const T* grad, T* out, const Blocks& blocks, const float* scale, int64_t begin, int64_t end,
                const Inside& inside) {
  if (blocks.columns) {
    for_each_column_vector(blocks, scale, begin, end, [&](int64_t i, int count, const Divisor& d, int64_t channel) {
      store_some(inside(i, count, d.scale, channel, true, load_some(grad + i, count)), out + i, count);
    });
    return;
  }
  for_each_block(blocks, begin, end, [&](int64_t i, int64_t last, int64_t index) {
    const Vec s(scale[index]);
    for (; i < last; i += Vec::size) {
      const int count = last - i < Vec::size ? static_cast<int>(last - i) : Vec::size;
      store_some(inside(i, count, s, index, false, load_some(grad + i, count)), out + i, count);
    }
  });
}

template <typename T>
void clip_float_range(const T* grad, const T* x, T* out, const Blocks& blocks, const float* scale, float low,
                      float high, int64_t begin, int64_t end) {
  const Vec lower(low), upper(high);
  clip_range(grad, out, blocks, scale, begin, end, [&](int64_t i, int count, Vec s, int64_t, bool, Vec g) {
    return keep_within(load_some(x + i, count) / s, lower, upper, g);
  });
}

template <typename T>
void clip_grid_range(const T* grad, const T* x, T* out, const Blocks& blocks, const float* scale,
                     const float* zero_point, IntegerRange range, int64_t begin, int64_t end) {
  const Vec qmin(range.qmin), qmax(range.qmax);
  clip_range(grad, out, blocks, scale, begin, end, [&](int64_t i, int count, Vec s, int64_t index, bool each, Vec g) {
    const Vec z = each ? load_some(zero_point + index, count) : Vec(zero_point[index]);
    return keep_within(round_even(load_some(x + i, count) / s) + z, qmin, qmax, g);
  });
}

template <typename T>
void ranges(const T* x, const Blocks& blocks, float* low, float* high, int64_t begin, int64_t end) {
  for_each_block(blocks, begin, end, [&](int64_t i, int64_t last, int64_t index) {
    Vec least_so_far(low[index]), most_so_far(high[index]);
    const Vec zero(0.0f);
    // NaN for what is not finite: min and max then give their second operand. -0 becomes 0.
    for (; i + Vec::size <= last; i += Vec::size) {
      const Vec v = Vec::load(x + i);
      const Vec finite = zero + v + zero * v;
      least_so_far = min(finite, least_so_far);
      most_so_far = max(finite, most_so_far);
    }
    if (i < last) {
      const float first = to_float(x[i]);
      const Vec v = Vec::load_first(x + i, static_cast<int>(last - i), first);
      const Vec finite = zero + v + zero * v;
      least_so_far = min(finite, least_so_far);
      most_so_far = max(finite, most_so_far);
    }
    low[index] = least(least_so_far);
    high[index] = greatest(most_so_far);
  });
}

template <typename T>
void largest_range(const T* x, const Blocks& blocks, float* largest, int64_t begin, int64_t end) {
  for_each_block(blocks, begin, end, [&](int64_t i, int64_t last, int64_t index) {
    Vec most(largest[index]);
    const Vec zero(0.0f);
    for (; i + Vec::size <= last; i += Vec::size) {
      const Vec magnitude = and_bits(Vec::load(x + i), kMagnitude);
      most = max(magnitude + zero * magnitude, most);
    }
    if (i < last) {
      const Vec magnitude = and_bits(Vec::load_first(x + i, static_cast<int>(last - i), 0.0f), kMagnitude);
      most = max(magnitude + zero * magnitude, most);
    }
    largest[index] = greatest(most);
  });
}

}  // namespace

void cast_blocks(const void* x, void* y, Blocks blocks, const float* scale, Element element, bool streaming,
                 int64_t begin, int64_t end) {
  RAREFY_FOR_FLOAT_TYPE(blocks.type, T,
                        cast_range(static_cast<const T*>(x), static_cast<T*>(y), blocks, scale, ToMinifloat(element),
                                   streaming, begin, end))
}

void grid_blocks(const void* x, void* y, Blocks blocks, const float* scale, const float* zero_point, IntegerRange range,
                 bool streaming, int64_t begin, int64_t end) {
  RAREFY_FOR_FLOAT_TYPE(
      blocks.type, T,
      grid_range(static_cast<const T*>(x), static_cast<T*>(y), blocks, scale, zero_point, range, streaming, begin, end))
}

void table_blocks(const void* x, void* y, Blocks blocks, const float* scale, Table table, int64_t begin, int64_t end) {
  RAREFY_FOR_FLOAT_TYPE(
      blocks.type, T,
      cast_range(static_cast<const T*>(x), static_cast<T*>(y), blocks, scale, ToTable{table}, false, begin, end))
}

void clip_blocks(const void* grad, const void* x, void* out, Blocks blocks, const float* scale, float low, float high,
                 int64_t begin, int64_t end) {
  RAREFY_FOR_FLOAT_TYPE(blocks.type, T,
                        clip_float_range(static_cast<const T*>(grad), static_cast<const T*>(x), static_cast<T*>(out),
                                         blocks, scale, low, high, begin, end))
}

void clip_grid_blocks(const void* grad, const void* x, void* out, Blocks blocks, const float* scale,
                      const float* zero_point, IntegerRange range, int64_t begin, int64_t end) {
  RAREFY_FOR_FLOAT_TYPE(blocks.type, T,
                        clip_grid_range(static_cast<const T*>(grad), static_cast<const T*>(x), static_cast<T*>(out),
                                        blocks, scale, zero_point, range, begin, end))
}

void block_ranges(const void* x, Blocks blocks, float* low, float* high, int64_t begin, int64_t end) {
  RAREFY_FOR_FLOAT_TYPE(blocks.type, T, ranges(static_cast<const T*>(x), blocks, low, high, begin, end))
}

void block_largest(const void* x, Blocks blocks, float* largest, int64_t begin, int64_t end) {
  RAREFY_FOR_FLOAT_TYPE(blocks.type, T, largest_range(static_cast<const T*>(x), blocks, largest, begin, end))
}

}  // namespace rarefy::cpu::RAREFY_ISA
