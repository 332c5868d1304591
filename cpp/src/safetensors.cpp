#include <ATen/ops/empty.h>
#include <rarefy/checkpoint.h>

#include <algorithm>
#include <bit>
#include <utility>

#include "safetensors_stream.h"

// A file is 8 bytes of header length, the header, and the tensors' bytes, all little-endian.
static_assert(std::endian::native == std::endian::little, "tensors are copied to and from files as they are in memory");

namespace rarefy::safetensors {
namespace {

uint64_t bytes_of(const Item& item) {
  uint64_t bytes = c10::elementSize(item.dtype);
  for (const int64_t size : item.shape) {
    bytes *= static_cast<uint64_t>(size);
  }
  return bytes;
}

/// Wide types first: with a header of a multiple of 8 bytes, every tensor is then aligned to its elements.
void sort(std::vector<Item>& items) {
  std::sort(items.begin(), items.end(), [](const Item& a, const Item& b) {
    return std::pair(c10::elementSize(b.dtype), a.name) < std::pair(c10::elementSize(a.dtype), b.name);
  });
}

/// The header's text, and the bytes of data that it describes.
std::pair<std::string, uint64_t> header_of(const std::vector<Item>& items, const Metadata& metadata,
                                           const char* function) {
  Header header{{}, metadata};
  uint64_t offset = 0;
  for (const auto& item : items) {
    const auto bytes = bytes_of(item);
    header.entries.push_back({item.name, item.dtype, item.shape, offset, offset + bytes});
    offset += bytes;
  }
  auto json = format(header);
  TORCH_CHECK_VALUE(json.size() <= kMaxHeader, "[", function, "] the header must have at most ", kMaxHeader,
                    " bytes, got ", json.size());
  return {std::move(json), offset};
}

}  // namespace

uint64_t file_size(const std::vector<Item>& items, const Metadata& metadata) {
  auto sorted = items;
  sort(sorted);  // offsets of other lengths make another header
  const auto [json, data] = header_of(sorted, metadata, "save_safetensors");
  return sizeof(uint64_t) + json.size() + data;
}

void write_items(std::vector<Item> items, const std::filesystem::path& path, const Metadata& metadata,
                 const char* function) {
  sort(items);
  const auto json = header_of(items, metadata, function).first;
  PendingFile file(path, function);
  const auto length = static_cast<uint64_t>(json.size());
  file.write(&length, sizeof(length));
  file.write(json.data(), json.size());
  for (const auto& item : items) {
    item.write(file);
  }
  file.commit();
}

Item item_of(const std::string& name, const torch::Tensor& tensor, const char* function) {
  TORCH_CHECK_VALUE(name != "__metadata__", "[", function, "] a tensor's name must not be '__metadata__'");
  TORCH_CHECK_VALUE(tensor.defined() && tensor.layout() == torch::kStrided && !tensor.is_meta(), "[", function,
                    "] tensor '", name, "' must be dense and have values");
  TORCH_CHECK_VALUE(name_of(tensor.scalar_type()) != nullptr, "[", function, "] tensor '", name,
                    "' must be of a type that the format knows, got ", tensor.scalar_type());
  return {name, tensor.scalar_type(), tensor.sizes().vec(), [tensor](PendingFile& file) {
            const auto dense = tensor.detach().to(torch::kCPU).resolve_conj().resolve_neg().contiguous();
            file.write(dense.const_data_ptr(), dense.nbytes());
          }};
}

Reader::Reader(const std::filesystem::path& path)
    : name_(path.string()), file_(::open(path.c_str(), O_RDONLY | O_CLOEXEC)) {
  TORCH_CHECK(file_.get() >= 0, "[load_safetensors] cannot open ", name_, ": ", last_error());
  struct stat status{};
  TORCH_CHECK(::fstat(file_.get(), &status) == 0, "[load_safetensors] cannot read ", name_, ": ", last_error());
  TORCH_CHECK_VALUE(S_ISREG(status.st_mode), "[load_safetensors] ", name_, " must be a regular file");
  const auto size = static_cast<uint64_t>(status.st_size);
  uint64_t length = 0;
  TORCH_CHECK_VALUE(size >= sizeof(length), "[load_safetensors] ", name_,
                    ": the file must begin with 8 bytes of header length, got ", size, " bytes in all");
  read_exactly(0, &length, sizeof(length));
  TORCH_CHECK_VALUE(length <= kMaxHeader, "[load_safetensors] ", name_, ": the header must have at most ", kMaxHeader,
                    " bytes, got ", length);
  TORCH_CHECK_VALUE(length <= size - sizeof(length), "[load_safetensors] ", name_,
                    ": the header must be inside of the file, got a length of ", length, " in a file of ", size,
                    " bytes");
  std::string json(length, '\0');
  read_exactly(sizeof(length), json.data(), length);
  data_begin_ = sizeof(length) + length;
  header_ = parse(json, size - data_begin_, name_);
}

void Reader::read_exactly(uint64_t position, void* data, uint64_t size) const {
  auto* bytes = static_cast<char*>(data);
  while (size > 0) {
    const auto count = ::pread(file_.get(), bytes, size, static_cast<off_t>(position));
    if (count < 0 && errno == EINTR) {
      continue;
    }
    TORCH_CHECK(count >= 0, "[load_safetensors] cannot read ", name_, ": ", last_error());
    TORCH_CHECK_VALUE(count > 0, "[load_safetensors] ", name_, ": the file ended while it was read");
    bytes += count;
    position += static_cast<uint64_t>(count);
    size -= static_cast<uint64_t>(count);
  }
}

void Reader::read(const Entry& of, uint64_t begin, void* data, uint64_t size) const {
  read_exactly(data_begin_ + of.begin + begin, data, size);
}

torch::Tensor Reader::read(const Entry& entry) const {
  auto tensor = at::empty(entry.shape, at::TensorOptions().dtype(entry.dtype));
  auto* data = tensor.mutable_data_ptr();
  read(entry, 0, data, entry.end - entry.begin);
  if (entry.dtype == torch::kBool) {
    const auto* bytes = static_cast<const uint8_t*>(data);
    TORCH_CHECK_VALUE(std::all_of(bytes, bytes + tensor.numel(), [](uint8_t byte) { return byte <= 1; }),
                      "[load_safetensors] ", name_, ": the bytes of bool tensor '", entry.name, "' must be 0 or 1");
  }
  return tensor;
}

}  // namespace rarefy::safetensors

namespace rarefy {

void save_safetensors(const NamedTensors& tensors, const std::filesystem::path& path, const Metadata& metadata) {
  std::vector<safetensors::Item> items;
  for (const auto& item : tensors) {
    items.push_back(safetensors::item_of(item.key(), item.value(), "save_safetensors"));
  }
  safetensors::write_items(std::move(items), path, metadata, "save_safetensors");
}

Checkpoint load_safetensors(const std::filesystem::path& path) {
  safetensors::Reader file(path);
  Checkpoint result{NamedTensors(), std::move(file.header().metadata)};
  result.tensors.reserve(file.header().entries.size());
  for (const auto& entry : file.header().entries) {
    result.tensors.insert(entry.name, file.read(entry));
  }
  return result;
}

}  // namespace rarefy
