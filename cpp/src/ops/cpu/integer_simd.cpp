#include "ops/cpu/integer_simd.h"

#include "ops/cpu/simd.h"
#include "ops/cpu/simd_walk.h"

namespace rarefy::cpu::RAREFY_ISA {
namespace {

// --- quantize_mask ----------------------------------------------------------------------------------------------------

template <typename T>
class MaskedQuantizer {
 public:
  MaskedQuantizer(const T* x, uint8_t* q, uint8_t* mask) : x_(x), q_(q), bits_(mask) {}

  /// Writes the integers of one vector and returns the mask's bits.
  uint32_t vector(int64_t i, Vec multiplier, const Parameters& p) {
    const Vec value = Vec::load(x_ + i) * multiplier;
    const Vec q = to_grid(value, p);
    max(p.qmin, min(q, p.qmax)).store_bytes(q_ + i);
    nan_ = nan_ + (q - q);
    return within(q, p.qmin, p.qmax);
  }
  void some(int64_t i, int count, Vec multiplier, const Parameters& p) {
    const Vec q = to_grid(load_some(x_ + i, count) * multiplier, p);
    const Vec clamped = max(p.qmin, min(q, p.qmax));
    count == Vec::size ? clamped.store_bytes(q_ + i) : clamped.store_bytes_first(q_ + i, count);
    nan_ = nan_ + (q - q);
    bits_.push(within(q, p.qmin, p.qmax) & ((1u << count) - 1u), count);
  }
  void run(int64_t i, int64_t end, Vec multiplier, const Parameters& p) {
    if (i % 64 == 0) {
      for (; i + 64 <= end; i += 64) {
        uint64_t word = 0;
        for (int lane = 0; lane < 64; lane += Vec::size) {
          word |= static_cast<uint64_t>(vector(i + lane, multiplier, p)) << lane;
        }
        bits_.push_word(word);
      }
    }
    for (; i < end; i += Vec::size) {
      some(i, end - i < Vec::size ? static_cast<int>(end - i) : Vec::size, multiplier, p);
    }
  }
  void finish() { bits_.finish(); }
  /// q - q is 0 for finite values and NaN otherwise, and sticks. An infinity sets it too.
  bool all_finite() const { return within(nan_, Vec(0.0f), Vec(0.0f)) == kAllLanes; }

 private:
  const T* x_;
  uint8_t* q_;
  BitWriter bits_;
  Vec nan_ = Vec(0.0f);
};

template <typename T>
bool has_nan(const T* x, Layout layout, const float* multiplier, int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; ++i) {
    const float value =
        to_float(x[i]) * (multiplier == nullptr ? 1.0f : multiplier[i / layout.inner % layout.channels]);
    if (value != value) {
      return true;
    }
  }
  return false;
}

template <typename T>
bool quantize_mask_range(const T* x, uint8_t* q, uint8_t* mask, Layout layout, Grid grid, const float* multiplier,
                         int64_t begin, int64_t end) {
  MaskedQuantizer<T> quantizer(x, q, mask + begin / 8);
  Parameters p(grid);
  if (has_rows(layout)) {
    for_each_row_vector(layout, begin, end, [&](int64_t i, int64_t channel, int count) {
      p.load(grid, channel, count);
      const Vec factor = multiplier == nullptr ? Vec(1.0f) : load_some(multiplier + channel, count);
      quantizer.some(i, count, factor, p);
    });
  } else {
    for_each_run(layout, begin, end, [&](int64_t first, int64_t last, int64_t channel) {
      p.set(grid, channel);
      quantizer.run(first, last, Vec(multiplier == nullptr ? 1.0f : multiplier[channel]), p);
    });
  }
  quantizer.finish();
  // Infinities are on the grid's edge; only a NaN has no integer, and is rare enough to be looked for again.
  return quantizer.all_finite() || !has_nan(x, layout, multiplier, begin, end);
}

// --- dequantize -------------------------------------------------------------------------------------------------------

template <typename Byte, typename T>
void dequantize_range(const Byte* q, T* y, Layout layout, const float* scale, const float* zero_point, int64_t begin,
                      int64_t end) {
  if (has_rows(layout)) {
    for_each_row_vector(layout, begin, end, [&](int64_t i, int64_t channel, int count) {
      const Vec value = count == Vec::size ? Vec::load_bytes(q + i) : load_bytes_first(q + i, count);
      store_some((value - load_some(zero_point + channel, count)) * load_some(scale + channel, count), y + i, count);
    });
    return;
  }
  for_each_run(layout, begin, end, [&](int64_t i, int64_t last, int64_t channel) {
    const Vec s(scale[channel]), z(zero_point[channel]);
    for (; i + Vec::size <= last; i += Vec::size) {
      ((Vec::load_bytes(q + i) - z) * s).store(y + i);
    }
    if (i < last) {
      const int count = static_cast<int>(last - i);
      ((load_bytes_first(q + i, count) - z) * s).store_first(y + i, count);
    }
  });
}

// --- finish_sums ------------------------------------------------------------------------------------------------------

template <typename T>
void finish_sums_range(const int32_t* sums, T* y, uint8_t* mask, Finish f, int64_t begin, int64_t end) {
  BitWriter bits(mask == nullptr ? nullptr : mask + begin / 8);
  const Vec zero(0.0f), lowest(bits_to_float(0xff800000u));
  for_each_row_vector({FloatType::f32, f.columns, 1}, begin, end, [&](int64_t i, int64_t column, int count) {
    const Vec sum = count == Vec::size ? Vec::load_difference(sums + i, f.offset + column)
                                       : load_difference_first(sums + i, f.offset + column, count);
    Vec out = sum * load_some(f.scale + column, count);
    if (f.bias != nullptr) {
      out = out + load_some(f.bias + column, count);
    }
    if (mask != nullptr) {
      bits.push(~within(out, lowest, zero) & ((1u << count) - 1u), count);
    }
    // max(0, NaN) is NaN.
    store_some(f.relu ? max(zero, out) : out, y + i, count);
  });
  if (mask != nullptr) {
    bits.finish();
  }
}

template <typename T>
void scale_to_bf16_range(const T* x, Bf16* y, int64_t columns, const float* scale, int64_t begin, int64_t end) {
  for_each_row_vector({FloatType::f32, columns, 1}, begin, end, [&](int64_t i, int64_t column, int count) {
    store_some(load_some(x + i, count) * load_some(scale + column, count), y + i, count);
  });
}

}  // namespace

bool quantize_mask(const void* x, uint8_t* q, uint8_t* mask, Layout layout, Grid grid, const float* multiplier,
                   int64_t begin, int64_t end) {
  RAREFY_FOR_FLOAT_TYPE(layout.type, T,
                        quantize_mask_range(static_cast<const T*>(x), q, mask, layout, grid, multiplier, begin, end))
}

void dequantize(const uint8_t* q, bool is_signed, void* y, Layout layout, const float* scale, const float* zero_point,
                int64_t begin, int64_t end) {
  if (is_signed) {
    const auto* bytes = reinterpret_cast<const int8_t*>(q);
    RAREFY_FOR_FLOAT_TYPE(layout.type, T,
                          dequantize_range(bytes, static_cast<T*>(y), layout, scale, zero_point, begin, end))
  }
  RAREFY_FOR_FLOAT_TYPE(layout.type, T, dequantize_range(q, static_cast<T*>(y), layout, scale, zero_point, begin, end))
}

void finish_sums(const int32_t* sums, void* y, FloatType type, uint8_t* mask, Finish finish, int64_t begin,
                 int64_t end) {
  RAREFY_FOR_FLOAT_TYPE(type, T, finish_sums_range(sums, static_cast<T*>(y), mask, finish, begin, end))
}

void positive_mask(const float* y, uint8_t* mask, int64_t begin, int64_t end) {
  BitWriter bits(mask + begin / 8);
  const Vec zero(0.0f), lowest(bits_to_float(0xff800000u));
  int64_t i = begin;
  for (; i + Vec::size <= end; i += Vec::size) {
    bits.push(~within(Vec::load(y + i), lowest, zero) & kAllLanes, Vec::size);
  }
  if (i < end) {
    const int count = static_cast<int>(end - i);
    bits.push(~within(Vec::load_first(y + i, count, 0.0f), lowest, zero) & ((1u << count) - 1u), count);
  }
  bits.finish();
}

void scale_to_bf16(const void* x, FloatType type, void* y, int64_t columns, const float* scale, int64_t begin,
                   int64_t end) {
  RAREFY_FOR_FLOAT_TYPE(
      type, T, scale_to_bf16_range(static_cast<const T*>(x), static_cast<Bf16*>(y), columns, scale, begin, end))
}

void scale_rows_from_bf16(const void* x, float* y, int64_t columns, const float* scale, int64_t begin, int64_t end) {
  const auto* in = static_cast<const Bf16*>(x);
  for (int64_t row = begin; row < end; ++row) {
    const Vec factor(scale[row]);
    const int64_t last = (row + 1) * columns;
    int64_t i = row * columns;
    for (; i + Vec::size <= last; i += Vec::size) {
      (Vec::load(in + i) * factor).store(y + i);
    }
    if (i < last) {
      const int count = static_cast<int>(last - i);
      (Vec::load_first(in + i, count, 0.0f) * factor).store_first(y + i, count);
    }
  }
}

void sum_bytes(const int8_t* weight, int64_t n, int32_t* sums, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row) {
    int32_t sum = 0;
    for (int64_t i = 0; i < n; ++i) {
      sum += weight[row * n + i];
    }
    sums[row] = sum;
  }
}

}  // namespace rarefy::cpu::RAREFY_ISA
