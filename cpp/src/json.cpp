#include "json.h"

#include <fmt/format.h>

#include <limits>

namespace rarefy {
namespace {

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

}  // namespace

bool JsonReader::take(char c) {
  skip_space();
  const bool found = at_ < text_.size() && text_[at_] == c;
  at_ += found ? 1 : 0;
  return found;
}

void JsonReader::end() {
  skip_space();
  require(at_ == text_.size(), "must end after its object, but goes on at byte ", at_);
}

void JsonReader::skip_space() {
  while (at_ < text_.size() && (text_[at_] == ' ' || text_[at_] == '\t' || text_[at_] == '\n' || text_[at_] == '\r')) {
    ++at_;
  }
}

uint64_t JsonReader::integer() {
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

uint32_t JsonReader::hexadecimal() {
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

void JsonReader::escape(std::string& text) {
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

std::string JsonReader::string() {
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

std::string JsonReader::value() {
  skip_space();
  const size_t start = at_;
  skip_value(0);
  return std::string(text_.substr(start, at_ - start));
}

void JsonReader::skip_value(int depth) {
  constexpr int most = 64;  // the reader calls itself
  require(depth < most, "must not nest deeper than ", most, " at byte ", at_);
  skip_space();
  require(at_ < text_.size(), "must be JSON, but ends where a value is due");
  switch (text_[at_]) {
    case '{':
      object([&](const std::string&) { skip_value(depth + 1); });
      return;
    case '[':
      array([&] { skip_value(depth + 1); });
      return;
    case '"':
      string();
      return;
    default:
      break;
  }
  for (const std::string_view literal : {"true", "false", "null"}) {
    if (text_.substr(at_, literal.size()) == literal) {
      at_ += literal.size();
      return;
    }
  }
  skip_number();
}

void JsonReader::skip_number() {
  const size_t start = at_;
  const auto digits = [&] {
    const size_t first = at_;
    while (at_ < text_.size() && text_[at_] >= '0' && text_[at_] <= '9') {
      ++at_;
    }
    require(at_ > first, "must be JSON with a value at byte ", start);
    return at_ - first;
  };
  const auto one_of = [&](std::string_view characters) {
    const bool found = at_ < text_.size() && characters.find(text_[at_]) != std::string_view::npos;
    at_ += found ? 1 : 0;
    return found;
  };
  one_of("-");
  const bool zero = at_ < text_.size() && text_[at_] == '0';
  require(digits() == 1 || !zero, "must have no leading zero at byte ", start);
  if (one_of(".")) {
    digits();
  }
  if (one_of("eE")) {
    one_of("+-");
    digits();
  }
}

void append_json(std::string& json, const std::string& text, const char* context) {
  TORCH_CHECK_VALUE(is_utf8(text), context, " must be UTF-8, got '", text, "'");
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

}  // namespace rarefy
