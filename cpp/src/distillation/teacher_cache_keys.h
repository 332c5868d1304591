// Sample ids as the bytes that a cache stores, and options as its header.
#pragma once

#include <rarefy/distillation/teacher_cache.h>

#include <cstring>
#include <string>
#include <vector>

#include "distillation/teacher_cache_format.h"

namespace rarefy::distillation::cache {

inline std::string key_bytes(int64_t key) {
  std::string bytes(sizeof(key), '\0');
  std::memcpy(bytes.data(), &key, sizeof(key));
  return bytes;
}

/// The key as a reader of an error message knows it.
inline std::string key_text(bool strings, const std::string& bytes) {
  if (strings) {
    return "'" + bytes + "'";
  }
  int64_t key;
  std::memcpy(&key, bytes.data(), sizeof(key));
  return std::to_string(key);
}

inline void check_key_kind(const TeacherCacheOptions& options, const char* given) {
  TORCH_CHECK_TYPE(options.key == given, "[TeacherCache] sample ids must be ", options.key, " as the file's, got ",
                   given);
}

inline std::vector<std::string> key_bytes(const torch::Tensor& keys) {
  TORCH_CHECK_TYPE(keys.scalar_type() == at::kLong, "[TeacherCache] sample ids must be int64 or strings, got ",
                   keys.scalar_type());
  TORCH_CHECK_VALUE(keys.dim() == 1, "[TeacherCache] sample ids must have shape [batch], got ", keys.sizes());
  const auto dense = keys.cpu().contiguous();
  std::vector<std::string> bytes;
  for (int64_t i = 0; i < dense.size(0); ++i) {
    bytes.push_back(key_bytes(dense.const_data_ptr<int64_t>()[i]));
  }
  return bytes;
}

/// The mask on the CPU; undefined stays so.
inline torch::Tensor dense_mask(const torch::Tensor& mask, int64_t batch) {
  if (!mask.defined()) {
    return mask;
  }
  TORCH_CHECK_TYPE(mask.scalar_type() == at::kBool, "[TeacherCache] mask must be bool, got ", mask.scalar_type());
  TORCH_CHECK_VALUE(mask.dim() == 2 && mask.size(0) == batch, "[TeacherCache] mask must have shape [", batch,
                    ", length], got ", mask.sizes());
  return mask.cpu().contiguous();
}

inline Header to_header(const TeacherCacheOptions& options) {
  Header header;
  header.values = options.dtype == "uint8" ? Values::uint8 : Values::float16;
  header.string_keys = options.key == "string" ? 1 : 0;
  header.classes = options.classes;
  header.k = options.k;
  header.temperature = options.temperature;
  std::memcpy(&header.fingerprint, options.fingerprint.data(), options.fingerprint.size());
  seal(header);
  return header;
}

inline TeacherCacheOptions to_options(const Header& header) {
  const std::string padded(static_cast<const char*>(header.fingerprint), kFingerprint);
  return {header.classes,
          header.k,
          header.temperature,
          header.values == Values::uint8 ? "uint8" : "float16",
          header.string_keys != 0 ? "string" : "int64",
          padded.substr(0, padded.find('\0'))};
}

/// The header of a file, or why it is none, as a c10::ValueError.
inline Header read_header(const uint8_t* data, size_t size, const std::string& name) {
  Header header;
  TORCH_CHECK_VALUE(size >= sizeof(header), "[TeacherCache] ", name, " must be a cache of teacher outputs, got ", size,
                    " bytes");
  std::memcpy(&header, data, sizeof(header));
  TORCH_CHECK_VALUE(header.magic == kMagic, "[TeacherCache] ", name,
                    " must be a cache of teacher outputs, got another kind of file");
  TORCH_CHECK_VALUE(header.version == kVersion, "[TeacherCache] ", name, " must be of version ", kVersion, ", got ",
                    header.version);
  TORCH_CHECK_VALUE(is_sealed(header), "[TeacherCache] ", name, " is damaged: its header is not as it was written");
  to_options(header).validate();
  return header;
}

}  // namespace rarefy::distillation::cache
