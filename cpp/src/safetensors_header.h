#pragma once

#include <c10/core/ScalarType.h>
#include <rarefy/checkpoint.h>

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

// The JSON header of a safetensors file:
//   {"__metadata__": {"key": "text"}, "name": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}, ...}
namespace rarefy::safetensors {

/// Longest header, as in other implementations of the format.
constexpr uint64_t kMaxHeader = 100'000'000;

/// One tensor of the header: the bytes [begin, end) of the data.
struct Entry {
  std::string name;
  c10::ScalarType dtype;
  std::vector<int64_t> shape;
  uint64_t begin = 0;
  uint64_t end = 0;
};

struct Header {
  std::vector<Entry> entries;
  Metadata metadata;
};

/// The format's name of a type, or null when it has none.
const char* name_of(c10::ScalarType dtype);

/// Parses and checks a header for `data_size` bytes of data; entries come back in the order of their data.
/// `file` is for messages. Throws c10::ValueError.
Header parse(std::string_view json, uint64_t data_size, const std::string& file);

/// The JSON text of a header, padded with spaces to a multiple of 8 bytes. Throws c10::ValueError for text that is not UTF-8.
std::string format(const Header& header);

}  // namespace rarefy::safetensors
