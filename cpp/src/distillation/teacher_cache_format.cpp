#include "distillation/teacher_cache_format.h"

#include <c10/util/Half.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>
#include <limits>

static_assert(std::endian::native == std::endian::little, "numbers are copied to and from files as they are in memory");

namespace rarefy::distillation::cache {
namespace {

constexpr double kInfinity = std::numeric_limits<double>::infinity();
constexpr double kLargestHalf = 65504.0;
constexpr int kLevels = 254;  // steps of a uint8 value; 255 is a logit of -inf

template <typename T>
void put(uint8_t*& out, T value) {
  std::memcpy(out, &value, sizeof(value));
  out += sizeof(value);
}

template <typename T>
T take(const uint8_t*& in) {
  T value;
  std::memcpy(&value, in, sizeof(value));
  in += sizeof(value);
  return value;
}

bool short_indices(const Header& header) { return header.classes <= 65536; }

/// Reads the directory of a block; false when its lengths do not fit together.
bool read_directory(const Header& header, const BlockHeader& block, const uint8_t* in, uint64_t data_offset,
                    std::vector<Sample>* samples) {
  const uint8_t* end = in + block.directory_bytes;
  const uint64_t row = row_bytes(header);
  uint64_t used = 0;
  for (int64_t i = 0; i < block.samples; ++i) {
    if (end - in < static_cast<ptrdiff_t>(sizeof(uint32_t) + sizeof(int64_t))) {
      return false;
    }
    const auto bytes = take<uint32_t>(in);
    const auto length = take<int64_t>(in);
    if (end - in < static_cast<ptrdiff_t>(bytes) || length < -1) {
      return false;
    }
    Sample sample{std::string(reinterpret_cast<const char*>(in), bytes), length, data_offset + used};
    in += bytes;
    const auto rows = static_cast<uint64_t>(sample.rows());
    if (rows > (block.data_bytes - used) / row) {
      return false;
    }
    used += rows * row;
    samples->push_back(std::move(sample));
  }
  return in == end && used == block.data_bytes;
}

uint32_t directory_checksum(BlockHeader block, const uint8_t* directory) {
  block.directory_checksum = 0;
  return checksum(directory, block.directory_bytes, checksum(&block, sizeof(block)));
}

}  // namespace

void Losses::add(const Losses& other) {
  rows += other.rows;
  error_sum += other.error_sum;
  error_squares += other.error_squares;
  error_max = std::max(error_max, other.error_max);
  tail_sum += other.tail_sum;
  tail_max = std::max(tail_max, other.tail_max);
  range_max = std::max(range_max, other.range_max);
}

void seal(Header& header) {
  header.checksum = 0;
  header.checksum = checksum(&header, sizeof(header));
}

bool is_sealed(const Header& header) {
  Header copy = header;
  seal(copy);
  return copy.checksum == header.checksum;
}

size_t row_bytes(const Header& header) {
  const auto k = static_cast<size_t>(header.k);
  const size_t indices = k * (short_indices(header) ? sizeof(uint16_t) : sizeof(int32_t));
  return header.values == Values::uint8 ? 3 * sizeof(float) + indices + k : 2 * sizeof(float) + indices + 2 * k;
}

double encode_row(const Header& header, const double* values, const int64_t* indices, double tail, uint8_t* out) {
  const uint8_t* start = out;
  const int64_t k = header.k;
  const auto top = static_cast<float>(values[0]);
  // Differences from the top, which lose nothing where it counts: a softmax does not see what all logits share.
  const auto difference = [&](int64_t j) { return std::max(0.0, static_cast<double>(top) - values[j]); };
  double widest = 0.0;
  for (int64_t j = 0; j < k; ++j) {
    widest = values[j] == -kInfinity ? widest : std::max(widest, difference(j));
  }
  const auto scale = static_cast<float>(widest / kLevels);
  put(out, top);
  put(out, static_cast<float>(tail));
  if (header.values == Values::uint8) {
    put(out, scale);
  }
  for (int64_t j = 0; j < k; ++j) {
    if (short_indices(header)) {
      put(out, static_cast<uint16_t>(indices[j]));
    } else {
      put(out, static_cast<int32_t>(indices[j]));
    }
  }
  for (int64_t j = 0; j < k; ++j) {
    const bool gone = values[j] == -kInfinity;
    if (header.values == Values::uint8) {
      const double steps = scale > 0.0f ? std::nearbyint(difference(j) / static_cast<double>(scale)) : 0.0;
      put(out, static_cast<uint8_t>(gone ? kLevels + 1 : std::min<int>(kLevels, static_cast<int>(steps))));
    } else {
      const double stored = gone ? kInfinity : std::min(difference(j), kLargestHalf);
      put(out, c10::Half(static_cast<float>(stored)).x);
    }
  }
  // What a reader will see, compared with what was given.
  std::vector<float> read(static_cast<size_t>(k));
  std::vector<int64_t> ignored(static_cast<size_t>(k));
  float read_tail;
  decode_row(header, start, read.data(), ignored.data(), &read_tail);
  double error = tail == -kInfinity ? 0.0 : std::abs(static_cast<double>(read_tail) - tail);
  for (int64_t j = 0; j < k; ++j) {
    if (values[j] != -kInfinity) {
      error = std::max(error, std::abs(static_cast<double>(read[static_cast<size_t>(j)]) - values[j]));
    }
  }
  return error;
}

void decode_row(const Header& header, const uint8_t* row, float* values, int64_t* indices, float* tail) {
  const auto top = take<float>(row);
  *tail = take<float>(row);
  const auto scale = header.values == Values::uint8 ? take<float>(row) : 0.0f;
  for (int64_t j = 0; j < header.k; ++j) {
    indices[j] = short_indices(header) ? static_cast<int64_t>(take<uint16_t>(row)) : take<int32_t>(row);
  }
  for (int64_t j = 0; j < header.k; ++j) {
    if (header.values == Values::uint8) {
      const auto steps = take<uint8_t>(row);
      values[j] = steps > kLevels ? -std::numeric_limits<float>::infinity() : top - static_cast<float>(steps) * scale;
    } else {
      values[j] = top - static_cast<float>(c10::Half(take<uint16_t>(row), c10::Half::from_bits()));
    }
  }
}

std::vector<uint8_t> format_block(const std::vector<Sample>& samples, const std::vector<uint8_t>& data,
                                  const Losses& losses) {
  size_t directory = 0;
  for (const auto& sample : samples) {
    directory += sizeof(uint32_t) + sizeof(int64_t) + sample.key.size();
  }
  BlockHeader header;
  header.directory_bytes = static_cast<uint32_t>(directory);
  header.data_bytes = data.size();
  header.samples = static_cast<int64_t>(samples.size());
  header.losses = losses;
  header.data_checksum = checksum(data.data(), data.size());
  std::vector<uint8_t> bytes(sizeof(header) + directory + data.size());
  uint8_t* out = bytes.data() + sizeof(header);
  for (const auto& sample : samples) {
    put(out, static_cast<uint32_t>(sample.key.size()));
    put(out, sample.length);
    out = std::copy(sample.key.begin(), sample.key.end(), out);
  }
  header.directory_checksum = directory_checksum(header, bytes.data() + sizeof(header));
  std::memcpy(bytes.data(), &header, sizeof(header));
  std::copy(data.begin(), data.end(), out);
  return bytes;
}

std::vector<uint8_t> format_end(int64_t samples) {
  BlockHeader header;
  header.magic = kEndMagic;
  header.samples = samples;
  header.directory_checksum = directory_checksum(header, nullptr);
  std::vector<uint8_t> bytes(sizeof(header));
  std::memcpy(bytes.data(), &header, sizeof(header));
  return bytes;
}

Contents scan(const Header& header, const uint8_t* file, size_t size, bool check_rows) {
  Contents contents;
  contents.end = sizeof(Header);
  while (size - contents.end >= sizeof(BlockHeader)) {
    BlockHeader block;
    std::memcpy(&block, file + contents.end, sizeof(block));
    const uint64_t left = size - contents.end - sizeof(block);
    const uint8_t* directory = file + contents.end + sizeof(block);
    if ((block.magic != kBlockMagic && block.magic != kEndMagic) || block.directory_bytes > left ||
        block.data_bytes > left - block.directory_bytes ||
        directory_checksum(block, directory) != block.directory_checksum) {
      break;
    }
    if (block.magic == kEndMagic) {
      contents.complete = block.samples == contents.samples && left == 0;
      break;
    }
    const uint64_t data_offset = contents.end + sizeof(block) + block.directory_bytes;
    Block found{data_offset, block.data_bytes, block.data_checksum, {}};
    if (!read_directory(header, block, directory, data_offset, &found.samples) ||
        (check_rows && checksum(file + data_offset, block.data_bytes) != block.data_checksum)) {
      break;
    }
    contents.blocks.push_back(std::move(found));
    contents.losses.add(block.losses);
    contents.samples += block.samples;
    contents.end = data_offset + block.data_bytes;
  }
  return contents;
}

}  // namespace rarefy::distillation::cache
