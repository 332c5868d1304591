#pragma once

#include <string>

namespace rarefy::pruning {

/// Text as it may stand in HTML.
inline std::string escaped(const std::string& text) {
  std::string out;
  for (const char c : text) {
    out += c == '<' ? "&lt;" : c == '>' ? "&gt;" : c == '&' ? "&amp;" : std::string(1, c);
  }
  return out;
}

}  // namespace rarefy::pruning
