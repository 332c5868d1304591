#include "pruning/sparse_manifest.h"

#include <fmt/format.h>
#include <fmt/ranges.h>
#include <rarefy/version.h>

#include <limits>
#include <optional>
#include <utility>

#include "json.h"

namespace rarefy::pruning {
namespace {

constexpr uint64_t kFormat = 1;
constexpr size_t kMaxDimensions = 64;
constexpr int64_t kMaxElements = std::numeric_limits<int64_t>::max() / 16;

SparseRecord read_record(JsonReader& reader, const std::string& name) {
  SparseRecord record;
  std::string form;
  std::optional<uint64_t> axis;
  reader.object([&](const std::string& field) {
    if (field == "form") {
      form = reader.string();
    } else if (field == "shape") {
      int64_t elements = 1;
      reader.array([&] {
        const uint64_t size = reader.integer();
        reader.require(
            record.shape.size() < kMaxDimensions && size > 0 && size <= static_cast<uint64_t>(kMaxElements / elements),
            "must give a shape of at least 1 and fewer than 2^59 elements to '", name, "'");
        elements *= static_cast<int64_t>(size);
        record.shape.push_back(static_cast<int64_t>(size));
      });
    } else if (field == "axis") {
      axis = reader.integer();
    } else if (field == "mask") {
      const auto value = reader.value();
      reader.require(value == "true" || value == "false", "must say true or false for the mask of '", name, "', got ",
                     value);
      record.is_mask = value == "true";
    } else {
      reader.require(false, "must describe '", name, "' by form, shape, axis and mask, got '", field, "'");
    }
  });
  reader.require(form == "bitmask" || form == "1:4", "must give the form 'bitmask' or '1:4' to '", name, "', got '",
                 form, "'");
  reader.require(axis.has_value() == (form == "1:4"), "must give an axis to '", name, "' if its form is '1:4' only");
  if (axis.has_value()) {
    record.form = SparseForm::one_of_four;
    reader.require(*axis < record.shape.size() && record.shape[*axis] % 4 == 0, "must give '", name,
                   "' an axis whose size is a multiple of 4, got ", *axis);
    record.axis = static_cast<int64_t>(*axis);
  }
  return record;
}

}  // namespace

int64_t SparseRecord::elements() const {
  int64_t out = 1;
  for (const int64_t size : shape) {
    out *= size;
  }
  return out;
}

std::string to_json(const SparseRecords& records) {
  std::string of_tensors;
  for (const auto& [name_of_tensor, record] : records) {
    of_tensors += of_tensors.empty() ? "" : ",";
    append_json(of_tensors, name_of_tensor, "[save_sparse] names");
    of_tensors += fmt::format(R"(:{{"form":"{}","shape":[{}])", name(record.form), fmt::join(record.shape, ","));
    if (record.form == SparseForm::one_of_four) {
      of_tensors += fmt::format(R"(,"axis":{})", record.axis);
    }
    of_tensors += record.is_mask ? R"(,"mask":true})" : "}";
  }
  return fmt::format(R"({{"format":{},"rarefy":"{}","tensors":{{{}}}}})", kFormat, RAREFY_VERSION, of_tensors);
}

SparseRecords parse_sparse_records(const std::string& json, const std::string& file) {
  JsonReader reader(json, "[load_sparse] " + file + ": the description of sparse tensors ");
  SparseRecords records;
  std::optional<uint64_t> format;
  reader.object([&](const std::string& field) {
    if (field == "format") {
      format = reader.integer();
      reader.require(*format == kFormat, "must be of format ", kFormat, ", got ", *format,
                     " (made by another version of rarefy)");
    } else if (field == "tensors") {
      reader.object([&](const std::string& tensor) {
        const bool is_new = records.emplace(tensor, read_record(reader, tensor)).second;
        reader.require(is_new, "must not repeat the name '", tensor, "'");
      });
    } else {
      reader.value();  // for readers of this format that know more
    }
  });
  reader.end();
  reader.require(format.has_value(), "must say its format");
  return records;
}

}  // namespace rarefy::pruning
