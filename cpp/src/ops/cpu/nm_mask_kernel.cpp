#include <rarefy/ops/mask.h>
#include <torch/library.h>

#include <algorithm>
#include <atomic>
#include <bit>
#include <limits>
#include <utility>
#include <vector>

#include "ops/cpu/dense.h"
#include "ops/cpu/mask_simd.h"
#include "ops/cpu/pack_bits.h"
#include "ops/mask_checks.h"

namespace rarefy::ops {
namespace {

[[noreturn]] void throw_nan(const at::Tensor& x) {
  const auto bad = x.isnan().flatten().nonzero();
  TORCH_CHECK_VALUE(false, "[nm_mask] x must not be NaN, got NaN in tensor 0 at flat index ", bad[0].item<int64_t>());
}

/// Keys that sort as numbers do, or as magnitudes; the bits of float64 hold those of every other type.
int64_t key_of(double value, bool magnitude) {
  const int64_t bits = std::bit_cast<int64_t>(value), key = bits & 0x7fffffffffffffff;
  return bits < 0 && !magnitude ? -key : key;
}

constexpr int64_t kDead = std::numeric_limits<int64_t>::min();  // below every key
constexpr int64_t kInfinity = 0x7ff0000000000000;

/// Clears the kept bytes of the size - n smallest of a group of keys; of equal ones the earlier first.
void prune_group(const int64_t* keys, int64_t size, int64_t n, std::vector<std::pair<int64_t, int64_t>>& scratch,
                 uint8_t* kept, int64_t stride) {
  const int64_t pruned = size - n;
  constexpr int64_t kSmall = 16;  // comparing all pairs is faster than sorting
  if (size <= kSmall) {
    for (int64_t i = 0; i < size; ++i) {
      int64_t smaller = 0;
      for (int64_t j = 0; j < size; ++j) {
        smaller += keys[j] < keys[i] || (keys[j] == keys[i] && j < i) ? 1 : 0;
      }
      kept[i * stride] = smaller >= pruned ? 1 : 0;
    }
    return;
  }
  scratch.clear();
  for (int64_t i = 0; i < size; ++i) {
    scratch.emplace_back(keys[i], i);
  }
  std::nth_element(scratch.begin(), scratch.begin() + pruned - 1, scratch.end());
  for (int64_t i = 0; i < pruned; ++i) {
    kept[scratch[static_cast<size_t>(i)].second * stride] = 0;
  }
}

/// Any n, m, dimension, type, and mask. One line runs along the dimension.
template <typename T>
at::Tensor nm_mask_of_lines(const at::Tensor& x, int64_t n, int64_t m, int64_t dim, const uint8_t* alive,
                            bool magnitude) {
  const int64_t size = x.size(dim), inner = c10::multiply_integers(x.sizes().slice(static_cast<size_t>(dim) + 1));
  const T* values = x.const_data_ptr<T>();
  std::vector<uint8_t> kept(static_cast<size_t>(x.numel()), 1);
  std::atomic<bool> nan{false};
  at::parallel_for(0, x.numel() / size, std::max<int64_t>(1, kGrain / size), [&](int64_t first, int64_t last) {
    std::vector<int64_t> keys(static_cast<size_t>(size));
    std::vector<std::pair<int64_t, int64_t>> scratch;
    for (int64_t line = first; line < last; ++line) {
      const int64_t begin = line / inner * size * inner + line % inner;
      for (int64_t i = 0; i < size; ++i) {
        const int64_t place = begin + i * inner;
        const auto value = static_cast<double>(values[place]);
        if (value != value) {
          nan.store(true, std::memory_order_relaxed);
        }
        const bool is_alive = alive == nullptr || (alive[place / 8] >> (place % 8) & 1) != 0;
        keys[static_cast<size_t>(i)] = is_alive ? key_of(value, magnitude) : kDead;
      }
      for (int64_t i = 0; i < size; i += m) {
        const int64_t group = std::min(m, size - i);
        if (group > n) {
          prune_group(keys.data() + i, group, n, scratch, kept.data() + begin + i * inner, inner);
        }
      }
      for (int64_t i = 0; i < size; ++i) {
        if (keys[static_cast<size_t>(i)] == kDead) {
          kept[static_cast<size_t>(begin + i * inner)] = 0;
        }
      }
    }
  });
  if (nan.load()) {
    throw_nan(x);
  }
  return pack_bits(kept.data(), x.numel());
}

/// n of every 4 neighbours in memory, in vectors.
at::Tensor n_of_4_mask(const at::Tensor& x, int64_t n, bool magnitude) {
  auto out = at::empty({mask_bytes(x.numel())}, x.options().dtype(at::kByte));
  auto* mask = out.data_ptr<uint8_t>();
  const void* values = x.const_data_ptr();
  const auto type = layout_of(x, -1).type;
  std::atomic<bool> nan{false};
  parallel_words(x.numel(), [&](int64_t begin, int64_t end) {
    if (RAREFY_ISA_CALL(write_n_of_4, values, type, !magnitude, static_cast<int>(n), begin, end, mask) >
        cpu::kInfinityKey) {
      nan.store(true, std::memory_order_relaxed);
    }
  });
  if (nan.load()) {
    throw_nan(x);
  }
  return out;
}

at::Tensor nm_mask_cpu(const at::Tensor& x_, int64_t n, int64_t m, int64_t dim_, const std::optional<at::Tensor>& mask,
                       bool magnitude) {
  const int64_t dim = check_nm_mask(x_, n, m, dim_, mask);
  const auto x = x_.contiguous();
  const auto packed = mask.has_value() ? mask->contiguous() : at::Tensor();
  const bool neighbours = c10::multiply_integers(x.sizes().slice(static_cast<size_t>(dim) + 1)) == 1;
  if (m == 4 && neighbours && x.size(dim) % 4 == 0 && !packed.defined() && x.scalar_type() != at::kDouble) {
    return n_of_4_mask(x, n, magnitude);
  }
  const uint8_t* alive = packed.defined() ? packed.const_data_ptr<uint8_t>() : nullptr;
  switch (x.scalar_type()) {
    case at::kDouble:
      return nm_mask_of_lines<double>(x, n, m, dim, alive, magnitude);
    case at::kBFloat16:
      return nm_mask_of_lines<c10::BFloat16>(x, n, m, dim, alive, magnitude);
    case at::kHalf:
      return nm_mask_of_lines<c10::Half>(x, n, m, dim, alive, magnitude);
    default:
      return nm_mask_of_lines<float>(x, n, m, dim, alive, magnitude);
  }
}

}  // namespace

TORCH_LIBRARY_IMPL(rarefy, CPU, m) { m.impl("nm_mask", &nm_mask_cpu); }

}  // namespace rarefy::ops
