// Files of the safetensors format, written and read tensor by tensor: for the formats that are made of them.
#pragma once

#include <rarefy/checkpoint.h>

#include <cstdint>
#include <filesystem>
#include <functional>
#include <string>
#include <vector>

#include "pending_file.h"
#include "safetensors_header.h"

namespace rarefy::safetensors {

/// A tensor that is going to be written.
struct Item {
  std::string name;
  c10::ScalarType dtype;
  std::vector<int64_t> shape;
  /// Writes its elements, in contiguous order.
  std::function<void(PendingFile&)> write;
};

/// How long the file of these items is. Throws as write_items() does.
uint64_t file_size(const std::vector<Item>& items, const Metadata& metadata);

/// Writes a file, whole or not at all; errors are those of `function`. Throws c10::ValueError for names and text that are not
/// UTF-8 and for a header that is too long, c10::Error when the file cannot be written.
void write_items(std::vector<Item> items, const std::filesystem::path& path, const Metadata& metadata,
                 const char* function);

/// The item of a dense tensor. Throws c10::ValueError, as `function`, for one that the format cannot hold.
Item item_of(const std::string& name, const torch::Tensor& tensor, const char* function);

/// An open file whose header has been read and checked. Throws as load_safetensors() does.
class Reader {
 public:
  explicit Reader(const std::filesystem::path& path);

  const std::string& name() const { return name_; }
  const Header& header() const { return header_; }
  Header& header() { return header_; }

  /// The bytes [begin, begin + size) of the data, or of the entry `of` counted from its begin.
  void read(const Entry& of, uint64_t begin, void* data, uint64_t size) const;
  /// The whole of an entry.
  torch::Tensor read(const Entry& entry) const;

 private:
  void read_exactly(uint64_t position, void* data, uint64_t size) const;

  std::string name_;
  Descriptor file_;
  uint64_t data_begin_ = 0;
  Header header_;
};

}  // namespace rarefy::safetensors
