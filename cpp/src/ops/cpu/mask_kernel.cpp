// magnitude_mask and score_mask find their threshold in one pass over the weights and write the masks in a second one. A sample
// gives a narrow range of keys that holds the threshold nearly always; the pass counts what lies below the range and
// takes out what lies inside it, a few percent, and an exact selection among those ends it. Where the sample misled, or
// most weights are equal, histograms over all the weights narrow the range instead. Both give the same threshold.
#include <ATen/ops/empty.h>
#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>
#include <rarefy/ops/mask.h>
#include <torch/library.h>

#include <atomic>
#include <bit>
#include <cmath>
#include <cstring>
#include <type_traits>

#include "ops/cpu/dense.h"
#include "ops/cpu/mask_simd.h"
#include "ops/mask_checks.h"
#include "ops/selection.h"

namespace rarefy::ops {
namespace {

constexpr int64_t kChunk = 16384;    // elements that a thread works on at once; a multiple of kWord
constexpr uint64_t kPlaces = 16384;  // places of the sample that locates the threshold
constexpr int64_t kRun = 4;          // neighbours taken at each place: they share a cache line
constexpr int64_t kSample = static_cast<int64_t>(kPlaces) * kRun;  // with fewer elements than that, all are taken
// Half width of the located range, in standard deviations of the rank of as many independent elements. Neighbours are
// not quite independent: were they equal, the true deviation would be twice that.
constexpr double kDeviations = 6.0;
constexpr int64_t kInfinityKey64 = 0x7ff0000000000000;

struct Source {
  at::Tensor x;          // contiguous
  const uint8_t* alive;  // null for all
  at::Tensor alive_owner;
};

struct Chunk {
  size_t source;
  int64_t begin;
  int64_t end;
};

struct Keys {
  std::vector<Source> sources;
  std::vector<Chunk> chunks;
  bool is_signed = false;  // scores: numbers in their order; otherwise magnitudes
  bool is_double = false;
  int64_t total = 0;
  int64_t dead = 0;

  int64_t highest() const { return is_double ? kInfinityKey64 : int64_t{cpu::kInfinityKey}; }
  int64_t lowest() const { return is_signed ? -highest() : 0; }
  KeyRange all() const { return {lowest(), highest(), 0}; }
  /// The threshold above which every element lies.
  KeyRange none() const { return {lowest() - 1, lowest() - 1, 0}; }
};

int64_t key_of(double value) { return std::bit_cast<int64_t>(value) & 0x7fffffffffffffff; }
int64_t key_of(float value) { return std::bit_cast<int32_t>(value) & 0x7fffffff; }
int64_t key_of(c10::BFloat16 value) { return int64_t{value.x & 0x7fff} << 16; }
int64_t key_of(c10::Half value) { return key_of(static_cast<float>(value)); }

/// The key with the sign of the number.
template <typename T>
int64_t signed_key_of(T value) {
  const int64_t key = key_of(value);
  return std::signbit(static_cast<std::conditional_t<std::is_same_v<T, double>, double, float>>(value)) ? -key : key;
}

bool is_set(const uint8_t* mask, int64_t i) { return mask == nullptr || (mask[i / 8] >> (i % 8) & 1) != 0; }

template <typename T, typename Body>
auto with_keys_as(const at::Tensor& x, bool is_signed, const Body& body) {
  const T* values = x.const_data_ptr<T>();
  return is_signed ? body([values](int64_t i) { return signed_key_of(values[i]); })
                   : body([values](int64_t i) { return key_of(values[i]); });
}

/// Calls body(key_at), where key_at(i) is the key of the source's element i.
template <typename Body>
auto with_keys(const Keys& keys, const Source& source, const Body& body) {
  switch (source.x.scalar_type()) {
    case at::kDouble:
      return with_keys_as<double>(source.x, keys.is_signed, body);
    case at::kBFloat16:
      return with_keys_as<c10::BFloat16>(source.x, keys.is_signed, body);
    case at::kHalf:
      return with_keys_as<c10::Half>(source.x, keys.is_signed, body);
    default:
      return with_keys_as<float>(source.x, keys.is_signed, body);
  }
}

Keys make_keys(at::TensorList weights, const std::optional<at::TensorList>& masks, bool is_signed) {
  Keys keys;
  keys.is_signed = is_signed;
  for (const auto& weight : weights) {
    keys.is_double = keys.is_double || weight.scalar_type() == at::kDouble;
  }
  for (size_t i = 0; i < weights.size(); ++i) {
    // float64 among others: all are compared as float64, which is exact.
    Source source{(keys.is_double ? weights[i].to(at::kDouble) : weights[i]).contiguous(), nullptr, {}};
    if (masks.has_value()) {
      source.alive_owner = (*masks)[i].contiguous();
      source.alive = source.alive_owner.const_data_ptr<uint8_t>();
      keys.dead += pruned_count(source.alive_owner, source.x.numel());
    }
    for (int64_t begin = 0; begin < source.x.numel(); begin += kChunk) {
      keys.chunks.push_back({i, begin, std::min(begin + kChunk, source.x.numel())});
    }
    keys.total += source.x.numel();
    keys.sources.push_back(std::move(source));
  }
  return keys;
}

/// Runs body(chunk index) over all chunks in parallel.
template <typename Body>
void parallel_chunks(size_t chunks, const Body& body) {
  at::parallel_for(0, static_cast<int64_t>(chunks), 1, [&](int64_t first, int64_t last) {
    for (int64_t c = first; c < last; ++c) {
      body(static_cast<size_t>(c));
    }
  });
}

size_t this_thread() { return static_cast<size_t>(at::get_thread_num()); }

[[noreturn]] void throw_nan(const Keys& keys) {
  for (size_t i = 0; i < keys.sources.size(); ++i) {
    const int64_t elements = keys.sources[i].x.numel();
    const int64_t first = with_keys(keys, keys.sources[i], [&](const auto& key_at) {
      int64_t j = 0;
      while (j < elements && std::abs(key_at(j)) <= keys.highest()) {
        ++j;
      }
      return j;
    });
    TORCH_CHECK_VALUE(first == elements, keys.is_signed ? "[score_mask] scores" : "[magnitude_mask] weights",
                      " must not be NaN, got NaN in tensor ", i, " at flat index ", first);
  }
  TORCH_INTERNAL_ASSERT(false, "a NaN was seen and then was not found");
}

/// How many alive elements have a key below zero.
int64_t count_negative(const Keys& keys) {
  std::atomic<int64_t> count{0};
  parallel_chunks(keys.chunks.size(), [&](size_t c) {
    const Chunk& chunk = keys.chunks[c];
    const Source& source = keys.sources[chunk.source];
    count += with_keys(keys, source, [&](const auto& key_at) {
      int64_t mine = 0;
      for (int64_t i = chunk.begin; i < chunk.end; ++i) {
        mine += key_at(i) < 0 && is_set(source.alive, i) ? 1 : 0;
      }
      return mine;
    });
  });
  return count;
}

/// The key of the given rank among alive elements, and how many are below it, by passes over all weights.
KeyRange select_by_passes(const Keys& keys, KeyRange range, int64_t rank) {
  if (range.low < 0 && range.high >= 0) {  // the distance of two float64 keys of different sign may overflow
    const int64_t negative = count_negative(keys);
    range = rank < negative ? KeyRange{range.low, -1, range.below} : KeyRange{0, range.high, negative};
  }
  return select_rank(range, rank, 1, [&](const KeyRange& r, int shift, Histogram& histogram) {
    std::vector<Histogram> parts(static_cast<size_t>(at::get_num_threads()), Histogram{});
    parallel_chunks(keys.chunks.size(), [&](size_t c) {
      const Chunk& chunk = keys.chunks[c];
      const Source& source = keys.sources[chunk.source];
      Histogram& part = parts[this_thread()];
      with_keys(keys, source, [&](const auto& key_at) {
        for (int64_t i = chunk.begin; i < chunk.end; ++i) {
          const int64_t key = key_at(i);
          if (key >= r.low && key <= r.high && is_set(source.alive, i)) {
            ++part[static_cast<size_t>((key - r.low) >> shift)];
          }
        }
      });
    });
    for (const auto& part : parts) {
      for (size_t bin = 0; bin < part.size(); ++bin) {
        histogram[bin] += part[bin];
      }
    }
  });
}

/// The same among keys that were taken out; ends with a range of `width` keys or fewer. On one thread: starting others
/// costs about what they would save.
KeyRange select_among(const std::vector<std::vector<int32_t>>& taken, const KeyRange& range, int64_t rank,
                      int64_t width = 1) {
  return select_rank(range, rank, width, [&](const KeyRange& r, int shift, Histogram& histogram) {
    for (const auto& part : taken) {
      for (const int32_t key : part) {
        if (key >= r.low && key <= r.high) {
          ++histogram[static_cast<size_t>((key - r.low) >> shift)];
        }
      }
    }
  });
}

/// A range that holds the key of the given rank nearly always; its `below` is not known. A few neighbours are taken
/// from each of kPlaces equal stretches, at a scattered place, so that a period in the weights does not mislead it.
KeyRange locate(const Keys& keys, int64_t rank) {
  const KeyRange all = keys.all();
  if (keys.total <= kSample) {
    return all;
  }
  std::vector<int64_t> first;  // position of each source's first element among all
  for (int64_t position = 0; const auto& source : keys.sources) {
    first.push_back(position);
    position += source.x.numel();
  }
  const auto stretch = static_cast<uint64_t>(keys.total) / kPlaces;
  constexpr size_t kParts = 16;
  std::vector<std::vector<int32_t>> sample(kParts);
  parallel_chunks(kParts, [&](size_t part) {
    auto& mine = sample[part];
    mine.reserve(static_cast<size_t>(kSample) / kParts);
    for (uint64_t k = part * kPlaces / kParts; k < (part + 1) * kPlaces / kParts; ++k) {
      const uint64_t scatter = (k * 2654435761u) & 0xffffffffu;
      const auto position = static_cast<int64_t>(k * stretch + (scatter * stretch >> 32));
      const auto s = static_cast<size_t>(std::upper_bound(first.begin(), first.end(), position) - first.begin()) - 1;
      const Source& source = keys.sources[s];
      const int64_t begin = position - first[s], end = std::min(begin + kRun, source.x.numel());
      with_keys(keys, source, [&](const auto& key_at) {
        for (int64_t i = begin; i < end; ++i) {
          if (is_set(source.alive, i)) {
            mine.push_back(static_cast<int32_t>(std::clamp(key_at(i), all.low, all.high)));
          }
        }
      });
    }
  });
  int64_t size = 0;
  for (const auto& part : sample) {
    size += static_cast<int64_t>(part.size());
  }
  const double fraction = (static_cast<double>(rank) + 0.5) / static_cast<double>(keys.total - keys.dead);
  const double centre = fraction * static_cast<double>(size);
  const double spread = kDeviations * std::sqrt(centre * (1.0 - fraction)) + 8.0;
  const auto from = static_cast<int64_t>(std::floor(centre - spread));
  const auto to = static_cast<int64_t>(std::ceil(centre + spread));
  constexpr int64_t width = 512;  // of 2^23 keys per octave: as good as exact for a bound, and one pass less
  return {from < 0 ? all.low : select_among(sample, all, from, width).low,
          to >= size ? all.high : select_among(sample, all, to, width).high, 0};
}

/// The key of the given rank among alive elements of float32, bfloat16 and float16. rank < 0: only looks for NaN.
KeyRange select_by_scan(const Keys& keys, int64_t rank) {
  const KeyRange range = rank < 0 ? KeyRange{0, -1, 0} : locate(keys, rank);
  const auto threads = static_cast<size_t>(at::get_num_threads());
  // Beyond this, taking keys out costs more than reading the weights again.
  const auto limit = static_cast<size_t>(std::max(kSample, keys.total / 8) / static_cast<int64_t>(threads) + kChunk);
  struct Part {
    int64_t below = 0;
    int64_t inside = 0;
    int32_t largest = 0;
    std::vector<int32_t> scratch;
  };
  std::vector<Part> parts(threads);
  std::vector<std::vector<int32_t>> taken(threads);
  std::atomic<bool> overflow{false};
  parallel_chunks(keys.chunks.size(), [&](size_t c) {
    const Chunk& chunk = keys.chunks[c];
    const Source& source = keys.sources[chunk.source];
    Part& part = parts[this_thread()];
    auto& mine = taken[this_thread()];
    part.scratch.resize(static_cast<size_t>(kChunk + cpu::kScanSlack));
    const auto scan = RAREFY_ISA_CALL(scan_keys, source.x.const_data_ptr(), source.alive, layout_of(source.x, -1).type,
                                      keys.is_signed, static_cast<int32_t>(range.low), static_cast<int32_t>(range.high),
                                      chunk.begin, chunk.end, part.scratch.data());
    part.below += scan.below;
    part.inside += scan.inside;
    part.largest = std::max(part.largest, scan.largest);
    if (mine.size() + static_cast<size_t>(scan.inside) > limit) {
      overflow.store(true, std::memory_order_relaxed);
    } else {
      mine.insert(mine.end(), part.scratch.begin(), part.scratch.begin() + scan.inside);
    }
  });
  int64_t below = 0, inside = 0;
  for (const auto& part : parts) {
    if (part.largest > cpu::kInfinityKey) {
      throw_nan(keys);
    }
    below += part.below;
    inside += part.inside;
  }
  if (rank < 0) {
    return keys.none();
  }
  if (rank < below || rank >= below + inside) {
    return select_by_passes(keys, keys.all(), rank);
  }
  const KeyRange exact{range.low, range.high, below};
  return overflow.load() ? select_by_passes(keys, exact, rank) : select_among(taken, exact, rank);
}

KeyRange select_double(const Keys& keys, int64_t rank) {
  std::atomic<bool> nan{false};
  parallel_chunks(keys.chunks.size(), [&](size_t c) {
    const Chunk& chunk = keys.chunks[c];
    const double* values = keys.sources[chunk.source].x.const_data_ptr<double>();
    for (int64_t i = chunk.begin; i < chunk.end; ++i) {
      if (key_of(values[i]) > kInfinityKey64) {
        nan.store(true, std::memory_order_relaxed);
      }
    }
  });
  if (nan.load()) {
    throw_nan(keys);
  }
  return rank < 0 ? keys.none() : select_by_passes(keys, keys.all(), rank);
}

/// Masks of one chunk: alive and key > threshold. Returns the number of alive elements with key == threshold.
int64_t write_chunk(const Keys& keys, const Chunk& chunk, int64_t threshold, uint8_t* mask) {
  const Source& source = keys.sources[chunk.source];
  if (!keys.is_double) {
    return RAREFY_ISA_CALL(write_mask, source.x.const_data_ptr(), source.alive, layout_of(source.x, -1).type,
                           keys.is_signed, static_cast<int32_t>(threshold), chunk.begin, chunk.end, mask);
  }
  return with_keys(keys, source, [&](const auto& key_at) {
    int64_t ties = 0;
    for (int64_t i = chunk.begin; i < chunk.end; i += kWord) {
      uint64_t word = 0;
      for (int64_t j = i; j < std::min(i + kWord, chunk.end); ++j) {
        const int64_t key = key_at(j);
        const bool alive = is_set(source.alive, j);
        ties += alive && key == threshold ? 1 : 0;
        word |= static_cast<uint64_t>(alive && key > threshold) << (j - i);
      }
      std::memcpy(mask + i / 8, &word, sizeof word);
    }
    return ties;
  });
}

/// Writes all masks; of the alive elements with the threshold's key, the first `ties_pruned` are pruned.
void write_masks(const Keys& keys, int64_t threshold, int64_t ties_pruned, const std::vector<at::Tensor>& masks) {
  const auto mask_of = [&](const Chunk& chunk) { return static_cast<uint8_t*>(masks[chunk.source].data_ptr()); };
  std::vector<int64_t> ties(keys.chunks.size());
  parallel_chunks(keys.chunks.size(),
                  [&](size_t c) { ties[c] = write_chunk(keys, keys.chunks[c], threshold, mask_of(keys.chunks[c])); });
  struct Kept {
    size_t chunk;
    int64_t prune_first;
  };
  std::vector<Kept> again;  // chunks with ties that are kept
  for (size_t c = 0; c < ties.size(); ++c) {
    const int64_t pruned = std::min(ties_pruned, ties[c]);
    ties_pruned -= pruned;
    if (pruned < ties[c]) {
      again.push_back({c, pruned});
    }
  }
  parallel_chunks(again.size(), [&](size_t k) {
    const Chunk& chunk = keys.chunks[again[k].chunk];
    const Source& source = keys.sources[chunk.source];
    uint8_t* mask = mask_of(chunk);
    write_chunk(keys, chunk, threshold - 1, mask);
    with_keys(keys, source, [&](const auto& key_at) {
      int64_t left = again[k].prune_first;
      for (int64_t i = chunk.begin; left > 0; ++i) {
        if (key_at(i) == threshold && is_set(source.alive, i)) {
          mask[i / 8] = static_cast<uint8_t>(mask[i / 8] & ~(1u << (i % 8)));
          --left;
        }
      }
    });
  });
}

std::vector<at::Tensor> mask_of_lowest(at::TensorList values, double sparsity,
                                       const std::optional<at::TensorList>& masks, bool is_signed) {
  const Keys keys = make_keys(values, masks, is_signed);
  std::vector<at::Tensor> out;
  for (const auto& source : keys.sources) {
    out.push_back(at::empty({mask_bytes(source.x.numel())}, source.x.options().dtype(at::kByte)));
  }
  const int64_t more = std::max<int64_t>(0, elements_to_prune(sparsity, keys.total) - keys.dead);
  const KeyRange selected = keys.is_double ? select_double(keys, more - 1) : select_by_scan(keys, more - 1);
  write_masks(keys, selected.low, more - selected.below, out);
  return out;
}

std::vector<at::Tensor> magnitude_mask_cpu(at::TensorList weights, double sparsity,
                                           std::optional<at::TensorList> masks) {
  check_magnitude_mask("magnitude_mask", "weight", weights, sparsity, masks);
  return mask_of_lowest(weights, sparsity, masks, false);
}

std::vector<at::Tensor> score_mask_cpu(at::TensorList scores, double sparsity, std::optional<at::TensorList> masks) {
  check_magnitude_mask("score_mask", "score", scores, sparsity, masks);
  return mask_of_lowest(scores, sparsity, masks, true);
}

}  // namespace

TORCH_LIBRARY_IMPL(rarefy, CPU, m) {
  m.impl("magnitude_mask", &magnitude_mask_cpu);
  m.impl("score_mask", &score_mask_cpu);
}

}  // namespace rarefy::ops
