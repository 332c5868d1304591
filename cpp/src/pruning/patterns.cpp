#include "pruning/patterns.h"

namespace rarefy::pruning {
namespace {

/// Whole-text match with * and ?. On a mismatch the last * takes one more character.
bool matches(const std::string& pattern, const std::string& text) {
  size_t p = 0, t = 0, star = std::string::npos, retry = 0;
  while (t < text.size()) {
    if (p < pattern.size() && (pattern[p] == '?' || (pattern[p] != '*' && pattern[p] == text[t]))) {
      ++p;
      ++t;
    } else if (p < pattern.size() && pattern[p] == '*') {
      star = p++;
      retry = t;
    } else if (star != std::string::npos) {
      p = star + 1;
      t = ++retry;
    } else {
      return false;
    }
  }
  return pattern.find_first_not_of('*', p) == std::string::npos;
}

std::string module_of(const std::string& name) {
  const auto dot = name.rfind('.');
  return dot == std::string::npos ? "" : name.substr(0, dot);
}

}  // namespace

bool matches_parameter(const std::string& pattern, const std::string& name) {
  const auto module = module_of(name);
  return matches(pattern, name) || (!module.empty() && matches(pattern, module));
}

bool matches_tree(const std::string& pattern, const std::string& name) {
  for (auto path = name; !path.empty(); path = module_of(path)) {
    if (matches(pattern, path)) {
      return true;
    }
  }
  return false;
}

}  // namespace rarefy::pruning
