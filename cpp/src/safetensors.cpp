#include <ATen/ops/empty.h>
#include <rarefy/checkpoint.h>

#include <algorithm>
#include <bit>
#include <utility>

#include "pending_file.h"
#include "safetensors_header.h"

// A file is 8 bytes of header length, the header, and the tensors' bytes, all little-endian.
static_assert(std::endian::native == std::endian::little, "tensors are copied to and from files as they are in memory");

namespace rarefy {
namespace {

void read_exactly(const Descriptor& file, void* data, uint64_t size, const std::string& name) {
  auto* bytes = static_cast<char*>(data);
  while (size > 0) {
    const auto count = ::read(file.get(), bytes, size);
    if (count < 0 && errno == EINTR) {
      continue;
    }
    TORCH_CHECK(count >= 0, "[load_safetensors] cannot read ", name, ": ", last_error());
    TORCH_CHECK_VALUE(count > 0, "[load_safetensors] ", name, ": the file ended while it was read");
    bytes += count;
    size -= static_cast<uint64_t>(count);
  }
}

void require_storable(const std::string& name, const torch::Tensor& tensor) {
  TORCH_CHECK_VALUE(name != "__metadata__", "[save_safetensors] a tensor's name must not be '__metadata__'");
  TORCH_CHECK_VALUE(tensor.defined() && tensor.layout() == torch::kStrided && !tensor.is_meta(),
                    "[save_safetensors] tensor '", name, "' must be dense and have values");
  TORCH_CHECK_VALUE(safetensors::name_of(tensor.scalar_type()) != nullptr, "[save_safetensors] tensor '", name,
                    "' must be of a type that the format knows, got ", tensor.scalar_type());
}

}  // namespace

void save_safetensors(const NamedTensors& tensors, const std::filesystem::path& path, const Metadata& metadata) {
  std::vector<std::pair<std::string, torch::Tensor>> items;
  for (const auto& item : tensors) {
    require_storable(item.key(), item.value());
    items.emplace_back(item.key(), item.value());
  }
  // Wide types first: with a header of a multiple of 8 bytes, every tensor is then aligned to its elements.
  std::sort(items.begin(), items.end(), [](const auto& a, const auto& b) {
    return std::pair(b.second.element_size(), a.first) < std::pair(a.second.element_size(), b.first);
  });
  safetensors::Header header{{}, metadata};
  uint64_t offset = 0;
  for (const auto& [name, tensor] : items) {
    const auto bytes = static_cast<uint64_t>(tensor.numel()) * static_cast<uint64_t>(tensor.element_size());
    header.entries.push_back({name, tensor.scalar_type(), tensor.sizes().vec(), offset, offset + bytes});
    offset += bytes;
  }
  const auto json = safetensors::format(header);
  TORCH_CHECK_VALUE(json.size() <= safetensors::kMaxHeader, "[save_safetensors] the header must have at most ",
                    safetensors::kMaxHeader, " bytes, got ", json.size());

  PendingFile file(path, "save_safetensors");
  const auto length = static_cast<uint64_t>(json.size());
  file.write(&length, sizeof(length));
  file.write(json.data(), json.size());
  for (const auto& [name, tensor] : items) {
    const auto dense = tensor.detach().to(torch::kCPU).resolve_conj().resolve_neg().contiguous();
    file.write(dense.const_data_ptr(), dense.nbytes());
  }
  file.commit();
}

Checkpoint load_safetensors(const std::filesystem::path& path) {
  const auto name = path.string();
  const Descriptor file(::open(path.c_str(), O_RDONLY | O_CLOEXEC));
  TORCH_CHECK(file.get() >= 0, "[load_safetensors] cannot open ", name, ": ", last_error());
  struct stat status{};
  TORCH_CHECK(::fstat(file.get(), &status) == 0, "[load_safetensors] cannot read ", name, ": ", last_error());
  TORCH_CHECK_VALUE(S_ISREG(status.st_mode), "[load_safetensors] ", name, " must be a regular file");
  const auto size = static_cast<uint64_t>(status.st_size);
  uint64_t length = 0;
  TORCH_CHECK_VALUE(size >= sizeof(length), "[load_safetensors] ", name,
                    ": the file must begin with 8 bytes of header length, got ", size, " bytes in all");
  read_exactly(file, &length, sizeof(length), name);
  TORCH_CHECK_VALUE(length <= safetensors::kMaxHeader, "[load_safetensors] ", name, ": the header must have at most ",
                    safetensors::kMaxHeader, " bytes, got ", length);
  TORCH_CHECK_VALUE(length <= size - sizeof(length), "[load_safetensors] ", name,
                    ": the header must be inside of the file, got a length of ", length, " in a file of ", size,
                    " bytes");
  std::string json(length, '\0');
  read_exactly(file, json.data(), length, name);
  auto header = safetensors::parse(json, size - sizeof(length) - length, name);

  Checkpoint result{NamedTensors(), std::move(header.metadata)};
  result.tensors.reserve(header.entries.size());
  for (const auto& entry : header.entries) {
    auto tensor = at::empty(entry.shape, at::TensorOptions().dtype(entry.dtype));
    auto* data = tensor.mutable_data_ptr();
    read_exactly(file, data, entry.end - entry.begin, name);
    if (entry.dtype == torch::kBool) {
      const auto* bytes = static_cast<const uint8_t*>(data);
      TORCH_CHECK_VALUE(std::all_of(bytes, bytes + tensor.numel(), [](uint8_t byte) { return byte <= 1; }),
                        "[load_safetensors] ", name, ": the bytes of bool tensor '", entry.name, "' must be 0 or 1");
    }
    result.tensors.insert(entry.name, std::move(tensor));
  }
  return result;
}

}  // namespace rarefy
