#include <ATen/ops/full.h>
#include <rarefy/ops/apply_masks.h>
#include <torch/library.h>

#include <atomic>
#include <cstring>
#include <vector>

#include "ops/apply_masks_checks.h"
#include "ops/cpu/dense.h"
#include "ops/cpu/mask_simd.h"
#include "ops/cpu/stray_simd.h"
#include "ops/cpu/strided_range.h"

namespace rarefy::ops {
namespace {

struct Source {
  at::Tensor x, mask;  // the mask contiguous
  const uint8_t* bits;
  bool contiguous;
};

struct Chunk {
  size_t source;
  int64_t begin, end;
};

/// Whether the mask keeps all of the elements [begin, end); begin is a multiple of 64.
bool keeps_all(const uint8_t* mask, int64_t begin, int64_t end) {
  int64_t i = begin;
  for (; i + kWord <= end; i += kWord) {
    uint64_t word;
    std::memcpy(&word, mask + i / 8, sizeof word);
    if (word != ~uint64_t{0}) {
      return false;
    }
  }
  for (; i < end; ++i) {
    if ((mask[i / 8] >> (i % 8) & 1) == 0) {
      return false;
    }
  }
  return true;
}

/// Runs body(source index, source, begin, end) over the pieces of all tensors in parallel, without those that are kept whole.
template <typename Body>
void for_each_piece(at::TensorList tensors, at::TensorList masks, const Body& body) {
  std::vector<Source> sources;
  std::vector<Chunk> chunks;
  for (size_t i = 0; i < tensors.size(); ++i) {
    const auto mask = masks[i].contiguous();
    sources.push_back({tensors[i], mask, mask.const_data_ptr<uint8_t>(), tensors[i].is_contiguous()});
    for (int64_t begin = 0; begin < tensors[i].numel(); begin += kGrain) {
      chunks.push_back({i, begin, std::min(begin + kGrain, tensors[i].numel())});
    }
  }
  at::parallel_for(0, static_cast<int64_t>(chunks.size()), 1, [&](int64_t first, int64_t last) {
    for (int64_t c = first; c < last; ++c) {
      const Chunk& chunk = chunks[static_cast<size_t>(c)];
      const Source& source = sources[chunk.source];
      if (!keeps_all(source.bits, chunk.begin, chunk.end)) {
        body(chunk.source, source, chunk.begin, chunk.end);
      }
    }
  });
}

template <typename T>
void apply_strided(const Source& source, int64_t begin, int64_t end) {
  StridedRange(source.x).walk(static_cast<T*>(source.x.data_ptr()), begin, end, [&](T* p, int64_t i) {
    if ((source.bits[i / 8] >> (i % 8) & 1) == 0) {
      *p = 0;
    }
  });
}

template <typename T>
cpu::Stray count_strided(const Source& source, int64_t begin, int64_t end) {
  cpu::Stray result{0, -1};
  StridedRange(source.x).walk(static_cast<const T*>(source.x.const_data_ptr()), begin, end, [&](const T* p, int64_t i) {
    if ((source.bits[i / 8] >> (i % 8) & 1) == 0 && static_cast<T>(*p << 1) != 0) {
      result.first = result.count == 0 ? i : result.first;
      ++result.count;
    }
  });
  return result;
}

void apply_masks_cpu(at::TensorList tensors, at::TensorList masks) {
  check_masked_tensors("apply_masks_", tensors, masks);
  for_each_piece(tensors, masks, [](size_t, const Source& source, int64_t begin, int64_t end) {
    const int bytes = static_cast<int>(source.x.element_size());
    if (source.contiguous) {
      RAREFY_ISA_CALL(apply_mask, source.x.data_ptr(), source.bits, bytes, begin, end);
    } else if (bytes == 2) {
      apply_strided<uint16_t>(source, begin, end);
    } else if (bytes == 4) {
      apply_strided<uint32_t>(source, begin, end);
    } else {
      apply_strided<uint64_t>(source, begin, end);
    }
  });
}

at::Tensor stray_values_cpu(at::TensorList tensors, at::TensorList masks) {
  check_masked_tensors("stray_values", tensors, masks);
  std::vector<std::atomic<int64_t>> counts(tensors.size()), firsts(tensors.size());
  for (auto& first : firsts) {
    first.store(INT64_MAX, std::memory_order_relaxed);
  }
  for_each_piece(tensors, masks, [&](size_t index, const Source& source, int64_t begin, int64_t end) {
    const int bytes = static_cast<int>(source.x.element_size());
    const cpu::Stray stray =
        source.contiguous ? RAREFY_ISA_CALL(count_stray, source.x.const_data_ptr(), source.bits, bytes, begin, end)
        : bytes == 2      ? count_strided<uint16_t>(source, begin, end)
        : bytes == 4      ? count_strided<uint32_t>(source, begin, end)
                          : count_strided<uint64_t>(source, begin, end);
    if (stray.count > 0) {
      counts[index].fetch_add(stray.count, std::memory_order_relaxed);
      int64_t seen = firsts[index].load(std::memory_order_relaxed);
      while (stray.first < seen && !firsts[index].compare_exchange_weak(seen, stray.first, std::memory_order_relaxed)) {
      }
    }
  });
  auto out = at::full({static_cast<int64_t>(tensors.size()), 2}, -1, at::kLong);
  int64_t* rows = out.mutable_data_ptr<int64_t>();
  for (size_t i = 0; i < tensors.size(); ++i) {
    rows[2 * i] = counts[i].load();
    if (rows[2 * i] > 0) {
      rows[2 * i + 1] = firsts[i].load();
    }
  }
  return out;
}

}  // namespace

TORCH_LIBRARY_IMPL(rarefy, CPU, m) {
  m.impl("apply_masks_", &apply_masks_cpu);
  m.impl("stray_values", &stray_values_cpu);
}

}  // namespace rarefy::ops
