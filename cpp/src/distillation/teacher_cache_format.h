// The file of teacher_cache.h: its bytes, without tensors.
//
// header (192 bytes, once), then blocks. A block is one batch:
//   BlockHeader | directory: per sample {uint32 key bytes, int64 length, key} | rows
// A row is float32 top, float32 tail, [float32 scale,] k indices (uint16 when classes <= 65536, else int32), k values. The
// last block has no samples and says how many there are: without it the file is not complete. Both parts of a block carry a
// checksum, so that what a crash left half written is found. Numbers are little-endian.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "checksum.h"

namespace rarefy::distillation::cache {

constexpr uint64_t kMagic = 0x3145484341434652;  // "RFCACHE1"
constexpr uint32_t kVersion = 1;
constexpr uint32_t kBlockMagic = 0x4b4c4252;  // "RBLK"
constexpr uint32_t kEndMagic = 0x444e4552;    // "REND"
constexpr size_t kFingerprint = 128;

enum class Values : uint32_t { float16 = 0, uint8 = 1 };

struct Header {
  uint64_t magic = kMagic;
  uint32_t version = kVersion;
  Values values = Values::float16;
  uint32_t string_keys = 0;
  uint32_t checksum = 0;  // of the header with 0 here
  int64_t classes = 0;
  int64_t k = 0;
  double temperature = 0.0;
  char fingerprint[kFingerprint] = {};  // padded with zeros
  uint64_t reserved[2] = {};
};
static_assert(sizeof(Header) == 192);

/// What was lost in a number of rows: see TeacherCacheBound.
struct Losses {
  int64_t rows = 0;
  double error_sum = 0.0, error_squares = 0.0, error_max = 0.0;  // of stored logits
  double tail_sum = 0.0, tail_max = 0.0;                         // probability outside the k classes
  double range_max = 0.0;                                        // greatest minus least logit of a row

  void add(const Losses& other);
};

struct BlockHeader {
  uint32_t magic = kBlockMagic;
  uint32_t directory_checksum = 0;  // of this header with 0 in both checksums, and the directory
  uint32_t data_checksum = 0;       // of the rows
  uint32_t directory_bytes = 0;
  uint64_t data_bytes = 0;
  int64_t samples = 0;  // in an end block: of the whole file
  Losses losses;
};
static_assert(sizeof(BlockHeader) == 88);

struct Sample {
  std::string key;  // 8 bytes of an int64, or the string
  int64_t length;   // rows, or -1 for one row without a sequence axis
  uint64_t offset;  // of its rows in the file
  int64_t rows() const { return length < 0 ? 1 : length; }
};

struct Block {
  uint64_t data_offset, data_bytes;
  uint32_t data_checksum;
  std::vector<Sample> samples;
};

/// What a file holds, up to the first byte that is not as written.
struct Contents {
  std::vector<Block> blocks;
  Losses losses;
  int64_t samples = 0;
  uint64_t end = 0;       // bytes of whole blocks, header included
  bool complete = false;  // the end block is there and agrees
};

void seal(Header& header);
bool is_sealed(const Header& header);

/// Bytes of one row.
size_t row_bytes(const Header& header);

/// A row of logits that fall with j: values[0] >= values[1] >= ... Returns the largest error of a stored logit, the tail
/// included, after writing row_bytes to `out`. A difference beyond the type's range is stored as its largest.
double encode_row(const Header& header, const double* values, const int64_t* indices, double tail, uint8_t* out);
void decode_row(const Header& header, const uint8_t* row, float* values, int64_t* indices, float* tail);

/// The bytes of a block; `data` are the rows.
std::vector<uint8_t> format_block(const std::vector<Sample>& samples, const std::vector<uint8_t>& data,
                                  const Losses& losses);
std::vector<uint8_t> format_end(int64_t samples);

/// Reads the blocks behind the header. With `check_rows` the rows' checksums are compared too.
Contents scan(const Header& header, const uint8_t* file, size_t size, bool check_rows);

}  // namespace rarefy::distillation::cache
