// JSON (RFC 8259) as far as files of this library have it.
#pragma once

#include <c10/util/Exception.h>

#include <cstdint>
#include <string>
#include <string_view>
#include <utility>

namespace rarefy {

/// Reads JSON from front to back; the caller says what comes next. Throws c10::ValueError, which begins with `context`, for
/// what is no JSON or something else than what the caller asks for.
class JsonReader {
 public:
  /// The text must live as long as the reader.
  JsonReader(std::string_view text, std::string context) : text_(text), context_(std::move(context)) {}

  /// Throws unless the condition holds.
  template <typename... Rule>
  void require(bool condition, const Rule&... rule) const {
    TORCH_CHECK_VALUE(condition, context_, rule...);
  }

  bool begins_with(char c) const { return !text_.empty() && text_.front() == c; }
  /// Steps over `c` when it comes next.
  bool take(char c);
  void expect(char c) { require(take(c), "must be JSON with '", c, "' at byte ", at_); }
  /// Throws when anything but white space is left.
  void end();

  /// Calls item(name) for each name; it reads the value.
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

  /// Calls item() for each element; it reads the element.
  template <typename Item>
  void array(const Item& item) {
    expect('[');
    if (take(']')) {
      return;
    }
    do {
      item();
    } while (take(','));
    expect(']');
  }

  /// A non-negative integer.
  uint64_t integer();
  std::string string();
  /// Any value, as its text.
  std::string value();

 private:
  void skip_space();
  void skip_value(int depth);
  void skip_number();
  uint32_t hexadecimal();
  void escape(std::string& text);

  std::string_view text_;
  std::string context_;
  size_t at_ = 0;
};

/// Appends the text as a JSON string. Throws c10::ValueError, which begins with `context`, for text that is not UTF-8.
void append_json(std::string& json, const std::string& text, const char* context);

}  // namespace rarefy
