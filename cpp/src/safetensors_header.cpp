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
constexpr size_t kMaxDimensions = 64;  // what torch's own iterators take

std::optional<c10::ScalarType> type_of(std::string_view name) {
  for (const auto& [text, type] : kTypes) {
    if (name == text) {
      return type;
    }
  }
  return std::nullopt;
}

/// Unicode scalar values in their shortest form, and nothing else (The Unicode Standard, table 3-7).
bool is_utf8(std::string_view text) {
  size_t i = 0;
  while (i < text.size()) {
    const auto first = static_cast<unsigned char>(text[i]);
    const size_t more = first < 0x80   ? 0
                        : first < 0xc2 ? 4
                        : first < 0xe0 ? 1
                        : first < 0xf0 ? 2
                        : first < 0xf5 ? 3
                                       : 4;
    if (more == 4 || text.size() - i <= more) {
      return false;
    }
    for (size_t k = 1; k <= more; ++k) {
      const auto next = static_cast<unsigned char>(text[i + k]);
      const unsigned low = k > 1 ? 0x80 : first == 0xe0 ? 0xa0 : first == 0xf0 ? 0x90 : 0x80;
      const unsigned high = k > 1 ? 0xbf : first == 0xed ? 0x9f : first == 0xf4 ? 0x8f : 0xbf;
      if (next < low || next > high) {
        return false;
      }
    }
    i += more + 1;
  }
  return true;
}

void append_utf8(std::string& text, uint32_t code) {
  const auto put = [&](uint32_t byte) { text += static_cast<char>(byte); };
  if (code < 0x80) {
    put(code);
  } else if (code < 0x800) {
    put(0xc0 | (code >> 6));
    put(0x80 | (code & 0x3f));
  } else if (code < 0x10000) {
    put(0xe0 | (code >> 12));
    put(0x80 | ((code >> 6) & 0x3f));
    put(0x80 | (code & 0x3f));
  } else {
    put(0xf0 | (code >> 18));
    put(0x80 | ((code >> 12) & 0x3f));
    put(0x80 | ((code >> 6) & 0x3f));
    put(0x80 | (code & 0x3f));
  }
}

/// Reads the JSON (RFC 8259) that a header may consist of: objects, arrays, strings and non-negative integers.
class Parser {
 public:
  Parser(std::string_view text, const std::string& file) : text_(text), file_(file) {}

  Header header() {
    Header result;
    bool metadata_seen = false;
    std::unordered_set<std::string> names;
    require(!text_.empty() && text_.front() == '{', "must begin with '{'");
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
    skip_space();
    require(at_ == text_.size(), "must end after its object, but goes on at byte ", at_);
    return result;
  }

 private:
  template <typename... Rule>
  void require(bool condition, const Rule&... rule) const {
    TORCH_CHECK_VALUE(condition, "[load_safetensors] ", file_, ": the header ", rule...);
  }

  void skip_space() {
    while (at_ < text_.size() &&
           (text_[at_] == ' ' || text_[at_] == '\t' || text_[at_] == '\n' || text_[at_] == '\r')) {
      ++at_;
    }
  }

  bool take(char c) {
    skip_space();
    const bool found = at_ < text_.size() && text_[at_] == c;
    at_ += found ? 1 : 0;
    return found;
  }

  void expect(char c) { require(take(c), "must be JSON with '", c, "' at byte ", at_); }

  template <typename Item>
  void object(const Item& item) {
    expect('{');
    if (take('}')) {
      return;
    }
    do {
      auto name = string();
      expect(':');
      item(std::move(name));
    } while (take(','));
    expect('}');
  }

  std::vector<uint64_t> integers(size_t most, const std::string& what) {
    std::vector<uint64_t> values;
    expect('[');
    if (take(']')) {
      return values;
    }
    do {
      require(values.size() < most, "must have at most ", most, " numbers in ", what);
      values.push_back(integer());
    } while (take(','));
    expect(']');
    return values;
  }

  uint64_t integer() {
    skip_space();
    const size_t start = at_;
    uint64_t value = 0;
    while (at_ < text_.size() && text_[at_] >= '0' && text_[at_] <= '9') {
      const auto digit = static_cast<uint64_t>(text_[at_++] - '0');
      require(value <= (std::numeric_limits<uint64_t>::max() - digit) / 10, "must have numbers below 2^64, at byte ",
              start);
      value = value * 10 + digit;
    }
    const bool leading_zero = at_ - start > 1 && text_[start] == '0';
    const bool goes_on = at_ < text_.size() && (text_[at_] == '.' || text_[at_] == 'e' || text_[at_] == 'E');
    require(at_ > start && !leading_zero && !goes_on, "must have a non-negative integer at byte ", start);
    return value;
  }

  uint32_t hexadecimal() {
    require(text_.size() - at_ >= 4, "must have four hexadecimal digits at byte ", at_);
    uint32_t value = 0;
    for (int i = 0; i < 4; ++i, ++at_) {
      const char c = text_[at_];
      const int digit = c >= '0' && c <= '9'   ? c - '0'
                        : c >= 'a' && c <= 'f' ? c - 'a' + 10
                        : c >= 'A' && c <= 'F' ? c - 'A' + 10
                                               : -1;
      require(digit >= 0, "must have four hexadecimal digits at byte ", at_);
      value = value * 16 + static_cast<uint32_t>(digit);
    }
    return value;
  }

  void escape(std::string& text) {
    require(at_ < text_.size(), "must be JSON, but ends inside of a string");
    const char c = text_[at_++];
    constexpr std::string_view plain = "\"\\/", letters = "bfnrt", meanings = "\b\f\n\r\t";
    if (plain.find(c) != std::string_view::npos) {
      text += c;
    } else if (const auto i = letters.find(c); i != std::string_view::npos) {
      text += meanings[i];
    } else {
      require(c == 'u', "must be JSON, but has an unknown escape at byte ", at_ - 2);
      uint32_t code = hexadecimal();
      if (code >= 0xd800 && code < 0xdc00 && text_.substr(at_, 2) == "\\u") {
        at_ += 2;
        const uint32_t low = hexadecimal();
        require(low >= 0xdc00 && low < 0xe000, "must pair its surrogates, but does not at byte ", at_ - 6);
        code = 0x10000 + ((code - 0xd800) << 10) + (low - 0xdc00);
      }
      require(code < 0xd800 || code >= 0xe000, "must pair its surrogates, but does not at byte ", at_ - 6);
      append_utf8(text, code);
    }
  }

  std::string string() {
    expect('"');
    const size_t start = at_;
    std::string text;
    while (true) {
      require(at_ < text_.size(), "must be JSON, but ends inside of a string");
      const char c = text_[at_++];
      if (c == '"') {
        break;
      }
      require(static_cast<unsigned char>(c) >= 0x20, "must escape control characters, but has one at byte ", at_ - 1);
      if (c == '\\') {
        escape(text);
      } else {
        text += c;
      }
    }
    require(is_utf8(text), "must be UTF-8, but the string at byte ", start, " is not");
    return text;
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

  std::string_view text_;
  const std::string& file_;
  size_t at_ = 0;
};

void append_string(std::string& json, const std::string& text) {
  TORCH_CHECK_VALUE(is_utf8(text), "[save_safetensors] names and metadata must be UTF-8, got '", text, "'");
  json += '"';
  for (const char c : text) {
    if (c == '"' || c == '\\') {
      json += '\\';
      json += c;
    } else if (static_cast<unsigned char>(c) < 0x20) {
      json += fmt::format("\\u{:04x}", static_cast<int>(c));
    } else {
      json += c;
    }
  }
  json += '"';
}

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
      append_string(json, key);
      json += ':';
      append_string(json, value);
    }
    json += '}';
    separator = ",";
  }
  for (const auto& entry : header.entries) {
    json += std::exchange(separator, ",");
    append_string(json, entry.name);
    json += fmt::format(R"(:{{"dtype":"{}","shape":[{}],"data_offsets":[{},{}]}})", name_of(entry.dtype),
                        fmt::join(entry.shape, ","), entry.begin, entry.end);
  }
  json += '}';
  json.resize((json.size() + 7) / 8 * 8, ' ');
  return json;
}

}  // namespace rarefy::safetensors
