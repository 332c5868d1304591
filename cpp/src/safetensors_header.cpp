#include "safetensors_header.h"

#include <c10/util/Exception.h>
#include <fmt/format.h>
#include <fmt/ranges.h>

#include <algorithm>
#include <array>
#include <limits>
#include <optional>
#include <unordered_set>
#include <utility>

#include "json.h"

namespace rarefy::safetensors {
namespace {

constexpr std::array<std::pair<const char*, c10::ScalarType>, 19> kTypes{{
    {"BOOL", c10::ScalarType::Bool},
    {"U8", c10::ScalarType::Byte},
    {"I8", c10::ScalarType::Char},
    {"I16", c10::ScalarType::Short},
    {"U16", c10::ScalarType::UInt16},
    {"I32", c10::ScalarType::Int},
    {"U32", c10::ScalarType::UInt32},
    {"I64", c10::ScalarType::Long},
    {"U64", c10::ScalarType::UInt64},
    {"F8_E4M3", c10::ScalarType::Float8_e4m3fn},
    {"F8_E5M2", c10::ScalarType::Float8_e5m2},
    {"F8_E4M3FNUZ", c10::ScalarType::Float8_e4m3fnuz},
    {"F8_E5M2FNUZ", c10::ScalarType::Float8_e5m2fnuz},
    {"F8_E8M0", c10::ScalarType::Float8_e8m0fnu},
    {"F16", c10::ScalarType::Half},
    {"BF16", c10::ScalarType::BFloat16},
    {"F32", c10::ScalarType::Float},
    {"F64", c10::ScalarType::Double},
    {"C64", c10::ScalarType::ComplexFloat},
}};
constexpr const char* kWriter = "[save_safetensors] names and metadata";
constexpr size_t kMaxDimensions = 64;  // what torch's own iterators take

std::optional<c10::ScalarType> type_of(std::string_view name) {
  for (const auto& [text, type] : kTypes) {
    if (name == text) {
      return type;
    }
  }
  return std::nullopt;
}

/// Reads a header, of which only objects, arrays, strings and non-negative integers may be part.
class Parser : private JsonReader {
 public:
  Parser(std::string_view text, const std::string& file)
      : JsonReader(text, "[load_safetensors] " + file + ": the header ") {}

  Header header() {
    Header result;
    bool metadata_seen = false;
    std::unordered_set<std::string> names;
    require(begins_with('{'), "must begin with '{'");
    object([&](std::string name) {
      if (name == "__metadata__") {
        require(!std::exchange(metadata_seen, true), "must not repeat the name '__metadata__'");
        object([&](std::string key) {
          auto value = string();
          const auto [position, inserted] = result.metadata.emplace(std::move(key), std::move(value));
          require(inserted, "must not repeat the name '", position->first, "' in its metadata");
        });
        return;
      }
      const auto [position, inserted] = names.insert(name);
      require(inserted, "must not repeat the name '", name, "'");
      result.entries.push_back(entry(std::move(name)));
    });
    end();
    return result;
  }

 private:
  std::vector<uint64_t> integers(size_t most, const std::string& what) {
    std::vector<uint64_t> values;
    array([&] {
      require(values.size() < most, "must have at most ", most, " numbers in ", what);
      values.push_back(integer());
    });
    return values;
  }

  Entry entry(std::string name) {
    std::optional<std::string> dtype;
    std::optional<std::vector<uint64_t>> shape, offsets;
    object([&](const std::string& field) {
      const bool repeated =
          (field == "dtype" && dtype) || (field == "shape" && shape) || (field == "data_offsets" && offsets);
      require(!repeated, "must not repeat '", field, "' of tensor '", name, "'");
      if (field == "dtype") {
        dtype = string();
      } else if (field == "shape") {
        shape = integers(kMaxDimensions, "the shape of tensor '" + name + "'");
      } else if (field == "data_offsets") {
        offsets = integers(2, "the data_offsets of tensor '" + name + "'");
      } else {
        require(false, "must describe tensor '", name, "' by dtype, shape and data_offsets, got '", field, "'");
      }
    });
    require(dtype && shape && offsets, "must give dtype, shape and data_offsets of tensor '", name, "'");
    require(offsets->size() == 2, "must give two data_offsets of tensor '", name, "', got ", offsets->size());
    const auto type = type_of(*dtype);
    require(type.has_value(), "must give a known dtype of tensor '", name, "', got '", *dtype, "'");
    Entry result{std::move(name), *type, {}, (*offsets)[0], (*offsets)[1]};
    // The product without zeros must fit too: torch computes strides from it.
    uint64_t elements = c10::elementSize(*type);
    bool empty = false;
    for (const uint64_t size : *shape) {
      const uint64_t factor = std::max<uint64_t>(size, 1);
      require(factor <= static_cast<uint64_t>(std::numeric_limits<int64_t>::max()) / elements,
              "must give a shape of fewer than 2^63 bytes to tensor '", result.name, "'");
      elements *= factor;
      empty = empty || size == 0;
      result.shape.push_back(static_cast<int64_t>(size));
    }
    const uint64_t bytes = empty ? 0 : elements;
    require(result.begin <= result.end && result.end - result.begin == bytes, "must give tensor '", result.name, "' ",
            bytes, " bytes, as its dtype and shape say, got data_offsets [", result.begin, ", ", result.end, "]");
    return result;
  }
};

}  // namespace

const char* name_of(c10::ScalarType dtype) {
  for (const auto& [text, type] : kTypes) {
    if (type == dtype) {
      return text;
    }
  }
  return nullptr;
}

Header parse(std::string_view json, uint64_t data_size, const std::string& file) {
  auto header = Parser(json, file).header();
  auto& entries = header.entries;
  std::stable_sort(entries.begin(), entries.end(), [](const Entry& a, const Entry& b) {
    return std::pair(a.begin, a.end) < std::pair(b.begin, b.end);
  });
  uint64_t expected = 0;
  for (const auto& entry : entries) {
    TORCH_CHECK_VALUE(entry.begin == expected, "[load_safetensors] ", file, ": tensor '", entry.name,
                      "' must begin where the one before it ends, at ", expected, " of the data, got ", entry.begin);
    expected = entry.end;
  }
  TORCH_CHECK_VALUE(expected == data_size, "[load_safetensors] ", file,
                    ": the tensors must cover the data, but end at ", expected, " of ", data_size, " bytes");
  return header;
}

std::string format(const Header& header) {
  std::string json = "{";
  const char* separator = "";
  if (!header.metadata.empty()) {
    json += "\"__metadata__\":{";
    for (const auto& [key, value] : header.metadata) {
      json += std::exchange(separator, ",");
      append_json(json, key, kWriter);
      json += ':';
      append_json(json, value, kWriter);
    }
    json += '}';
    separator = ",";
  }
  for (const auto& entry : header.entries) {
    json += std::exchange(separator, ",");
    append_json(json, entry.name, kWriter);
    json += fmt::format(R"(:{{"dtype":"{}","shape":[{}],"data_offsets":[{},{}]}})", name_of(entry.dtype),
                        fmt::join(entry.shape, ","), entry.begin, entry.end);
  }
  json += '}';
  json.resize((json.size() + 7) / 8 * 8, ' ');
  return json;
}

}  // namespace rarefy::safetensors
