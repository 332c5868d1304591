// What the metadata of a compressed file say of its sparse tensors.
#pragma once

#include <rarefy/pruning/sparse_file.h>

#include <map>
#include <string>
#include <vector>

namespace rarefy::pruning {

struct SparseRecord {
  SparseForm form = SparseForm::bitmask;
  std::vector<int64_t> shape;
  int64_t axis = 0;      // along which one of four is kept
  bool is_mask = false;  // the bits are a pruner's mask

  int64_t elements() const;
};

using SparseRecords = std::map<std::string, SparseRecord>;

std::string to_json(const SparseRecords& records);

/// Throws c10::ValueError, which names `file`, for text that is no such JSON, for shapes and axes that cannot be, and for a
/// later format.
SparseRecords parse_sparse_records(const std::string& json, const std::string& file);

}  // namespace rarefy::pruning
