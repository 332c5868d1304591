#include "pruning/sparse_codec.h"

#include <ATen/ops/zeros.h>

#include <algorithm>
#include <bit>
#include <cstring>
#include <type_traits>

#include "ops/fake_quantize_checks.h"

namespace rarefy::pruning {
namespace {

constexpr int64_t kWord = 64;
constexpr size_t kBuffer = size_t{1} << 16;  // elements that are written or read at once

uint64_t word_at(const uint8_t* bits, int64_t word) {
  uint64_t out;
  std::memcpy(&out, bits + word * 8, sizeof out);
  return out;
}

/// Calls body(type) with the unsigned type of the elements' width.
template <typename Body>
auto with_words(const at::Tensor& x, const Body& body) {
  switch (x.element_size()) {
    case 1:
      return body(uint8_t{});
    case 2:
      return body(uint16_t{});
    case 4:
      return body(uint32_t{});
    default:
      return body(uint64_t{});
  }
}

/// Whether the sign bit alone means -0.
bool has_negative_zero(at::ScalarType type) {
  return type == at::kFloat || type == at::kDouble || type == at::kHalf || type == at::kBFloat16 ||
         type == at::kFloat8_e4m3fn || type == at::kFloat8_e5m2;
}

/// The bits of a word that say whether an element is zero: all but the sign where that alone means -0.
template <typename Word>
Word magnitude_bits(at::ScalarType type) {
  return has_negative_zero(type) ? static_cast<Word>(static_cast<Word>(~Word{0}) >> 1) : static_cast<Word>(~Word{0});
}

/// Calls body(i) for each element that is kept, in order.
template <typename Body>
void for_each_kept(const uint8_t* bits, int64_t n, const Body& body) {
  for (int64_t word = 0; word * kWord < n; ++word) {
    for (uint64_t rest = word_at(bits, word); rest != 0; rest &= rest - 1) {
      body(word * kWord + std::countr_zero(rest));
    }
  }
}

/// Calls body(group, first element, distance of neighbours) for each group of four along an axis; stops when it says false.
template <typename Body>
bool for_each_group(at::IntArrayRef shape, int64_t axis, const Body& body) {
  int64_t outer = 1, inner = 1;
  for (int64_t d = 0; d < static_cast<int64_t>(shape.size()); ++d) {
    (d < axis ? outer : inner) *= d == axis ? 1 : shape[static_cast<size_t>(d)];
  }
  const int64_t along = shape[static_cast<size_t>(axis)] / 4;
  int64_t group = 0;
  for (int64_t o = 0; o < outer * along; ++o) {
    for (int64_t i = 0; i < inner; ++i) {
      if (!body(group++, o * 4 * inner + i, inner)) {
        return false;
      }
    }
  }
  return true;
}

unsigned bit(const uint8_t* bits, int64_t i) { return static_cast<unsigned>(bits[i / 8] >> (i % 8) & 1); }

unsigned index_of(const uint8_t* indices, int64_t group) {
  return static_cast<unsigned>(indices[group / 4] >> (group % 4 * 2) & 3);
}

/// Collects elements and hands them on in large pieces.
template <typename Word>
class Writer {
 public:
  explicit Writer(const Sink& sink) : sink_(sink) { buffer_.reserve(kBuffer); }
  void add(Word value) {
    buffer_.push_back(value);
    if (buffer_.size() == kBuffer) {
      flush();
    }
  }
  void flush() {
    if (!buffer_.empty()) {
      sink_(buffer_.data(), buffer_.size() * sizeof(Word));
      buffer_.clear();
    }
  }

 private:
  const Sink& sink_;
  std::vector<Word> buffer_;
};

/// Fetches elements in large pieces.
template <typename Word>
class Fetcher {
 public:
  Fetcher(const Source& source, int64_t count) : source_(source), left_(static_cast<size_t>(count)) {}
  Word next() {
    if (at_ == buffer_.size()) {
      buffer_.resize(std::min(kBuffer, left_));
      source_(buffer_.data(), buffer_.size() * sizeof(Word));
      left_ -= buffer_.size();
      at_ = 0;
    }
    return buffer_[at_++];
  }

 private:
  const Source& source_;
  size_t left_, at_ = 0;
  std::vector<Word> buffer_;
};

}  // namespace

at::Tensor bits_of(const at::Tensor& x) {
  const int64_t n = x.numel();
  auto out = at::zeros({ops::mask_bytes(n)}, at::TensorOptions().dtype(at::kByte));
  auto* bits = out.mutable_data_ptr<uint8_t>();
  with_words(x, [&](auto type) {
    using Word = decltype(type);
    const Word magnitude = magnitude_bits<Word>(x.scalar_type());
    const auto* words = static_cast<const Word*>(x.const_data_ptr());
    for (int64_t first = 0; first < n; first += kWord) {
      uint64_t packed = 0;
      const int64_t count = std::min(kWord, n - first);
      for (int64_t i = 0; i < count; ++i) {
        packed |= static_cast<uint64_t>((words[first + i] & magnitude) != 0) << i;
      }
      std::memcpy(bits + first / 8, &packed, sizeof packed);
    }
  });
  return out;
}

int64_t count_kept(const uint8_t* bits, int64_t n) {
  int64_t kept = 0;
  for (int64_t word = 0; word * kWord < n; ++word) {
    const uint64_t packed = word_at(bits, word);
    const int64_t rest = n - word * kWord;
    if (rest < kWord && (packed >> rest) != 0) {
      return -1;
    }
    kept += std::popcount(packed);
  }
  return kept;
}

int64_t first_outside(const at::Tensor& x, const uint8_t* bits) {
  const int64_t n = x.numel();
  return with_words(x, [&](auto type) -> int64_t {
    using Word = decltype(type);
    const Word magnitude = magnitude_bits<Word>(x.scalar_type());
    const auto* words = static_cast<const Word*>(x.const_data_ptr());
    for (int64_t first = 0; first < n; first += kWord) {
      const int64_t count = std::min(kWord, n - first);
      const uint64_t valid = count == kWord ? ~uint64_t{0} : (uint64_t{1} << count) - 1;
      for (uint64_t rest = ~word_at(bits, first / kWord) & valid; rest != 0; rest &= rest - 1) {
        const int64_t i = first + std::countr_zero(rest);
        if ((words[i] & magnitude) != 0) {
          return i;
        }
      }
    }
    return -1;
  });
}

std::optional<int64_t> one_of_four_axis(at::IntArrayRef shape, const uint8_t* bits, bool exactly) {
  const auto dims = static_cast<int64_t>(shape.size());
  const auto fits = [&](int64_t axis) {
    return shape[static_cast<size_t>(axis)] % 4 == 0 &&
           for_each_group(shape, axis, [&](int64_t, int64_t first, int64_t step) {
             unsigned count = 0;
             for (int64_t k = 0; k < 4; ++k) {
               count += bit(bits, first + k * step);
             }
             return exactly ? count == 1 : count <= 1;
           });
  };
  for (const int64_t axis : {dims - 1, int64_t{1}}) {
    if (axis >= 0 && axis < dims && fits(axis)) {
      return axis;
    }
  }
  return std::nullopt;
}

at::Tensor unpacked(const uint8_t* bits, at::IntArrayRef shape) {
  auto out = at::zeros(shape, at::TensorOptions().dtype(at::kBool));
  auto* kept = out.mutable_data_ptr<bool>();
  for_each_kept(bits, out.numel(), [&](int64_t i) { kept[i] = true; });
  return out;
}

void gather(const at::Tensor& x, const uint8_t* bits, const Sink& sink) {
  with_words(x, [&](auto type) {
    using Word = decltype(type);
    const auto* words = static_cast<const Word*>(x.const_data_ptr());
    Writer<Word> writer(sink);
    for_each_kept(bits, x.numel(), [&](int64_t i) { writer.add(words[i]); });
    writer.flush();
  });
}

void scatter(const at::Tensor& x, const uint8_t* bits, const Source& source) {
  with_words(x, [&](auto type) {
    using Word = decltype(type);
    auto* words = static_cast<Word*>(x.mutable_data_ptr());
    Fetcher<Word> fetcher(source, count_kept(bits, x.numel()));
    for_each_kept(bits, x.numel(), [&](int64_t i) { words[i] = fetcher.next(); });
  });
}

std::vector<uint8_t> indices_of(at::IntArrayRef shape, int64_t axis, const uint8_t* bits) {
  int64_t n = 1;
  for (const int64_t size : shape) {
    n *= size;
  }
  std::vector<uint8_t> out(static_cast<size_t>(index_bytes(n)));
  for_each_group(shape, axis, [&](int64_t group, int64_t first, int64_t step) {
    for (int64_t k = 1; k < 4; ++k) {
      if (bit(bits, first + k * step) != 0) {
        out[static_cast<size_t>(group / 4)] |= static_cast<uint8_t>(k << (group % 4 * 2));
      }
    }
    return true;
  });
  return out;
}

at::Tensor bits_of_indices(at::IntArrayRef shape, int64_t axis, const uint8_t* indices) {
  int64_t n = 1;
  for (const int64_t size : shape) {
    n *= size;
  }
  auto out = at::zeros({ops::mask_bytes(n)}, at::TensorOptions().dtype(at::kByte));
  auto* bits = out.mutable_data_ptr<uint8_t>();
  for_each_group(shape, axis, [&](int64_t group, int64_t first, int64_t step) {
    const int64_t i = first + index_of(indices, group) * step;
    bits[i / 8] |= static_cast<uint8_t>(1 << (i % 8));
    return true;
  });
  return out;
}

void gather_groups(const at::Tensor& x, int64_t axis, const uint8_t* indices, bool keep_negative_zero,
                   const Sink& sink) {
  with_words(x, [&](auto type) {
    using Word = decltype(type);
    const auto* words = static_cast<const Word*>(x.const_data_ptr());
    const Word magnitude = keep_negative_zero ? static_cast<Word>(~Word{0}) : magnitude_bits<Word>(x.scalar_type());
    Writer<Word> writer(sink);
    for_each_group(x.sizes(), axis, [&](int64_t group, int64_t first, int64_t step) {
      const Word word = words[first + index_of(indices, group) * step];
      writer.add((word & magnitude) != 0 ? word : Word{0});
      return true;
    });
    writer.flush();
  });
}

void scatter_groups(const at::Tensor& x, int64_t axis, const uint8_t* indices, const Source& source) {
  with_words(x, [&](auto type) {
    using Word = decltype(type);
    auto* words = static_cast<Word*>(x.mutable_data_ptr());
    Fetcher<Word> fetcher(source, x.numel() / 4);
    for_each_group(x.sizes(), axis, [&](int64_t group, int64_t first, int64_t step) {
      words[first + index_of(indices, group) * step] = fetcher.next();
      return true;
    });
  });
}

}  // namespace rarefy::pruning
