// ONNX files: the messages of onnx.proto in protobuf's wire format, written without either library.
#pragma once

#include <cstdint>
#include <filesystem>
#include <string>

#include "onnx/model.h"

namespace rarefy::onnx {

/// TensorProto.DataType; throws c10::TypeError for a type that ONNX has no tensors of.
int64_t type_number(at::ScalarType dtype);

struct FileOptions {
  int64_t opset = 0;
  std::string producer_version;
  /// Initializers of more bytes in all go to `<file>.data`, those below 1 KiB excepted.
  int64_t external_above = 0;
};

/// Writes the model, whole or not at all, and returns the bytes written, those of `<file>.data` included.
int64_t write_file(const Model& model, const std::filesystem::path& path, const FileOptions& options);

}  // namespace rarefy::onnx
