#include <c10/util/Exception.h>
#include <fmt/format.h>
#include <rarefy/pruning/selection.h>

#include <algorithm>
#include <unordered_map>

#include "pruning/patterns.h"

namespace rarefy::pruning {
namespace {

bool matches_any(const std::vector<std::string>& patterns, const std::string& name) {
  return std::any_of(patterns.begin(), patterns.end(),
                     [&](const auto& pattern) { return matches_parameter(pattern, name); });
}

void check_patterns(const char* option, const std::vector<std::string>& patterns,
                    const std::vector<NamedParameter>& parameters) {
  for (const auto& pattern : patterns) {
    TORCH_CHECK_VALUE(std::any_of(parameters.begin(), parameters.end(),
                                  [&](const auto& parameter) { return matches_parameter(pattern, parameter.name); }),
                      "[select_parameters] every name in ", option,
                      " must be that of a parameter or of a module with parameters, got '", pattern, "'");
  }
}

}  // namespace

Selection select_parameters(const std::vector<NamedParameter>& parameters,
                            const std::optional<std::vector<std::string>>& include,
                            const std::vector<std::string>& exclude) {
  if (include.has_value()) {
    check_patterns("include", *include, parameters);
  }
  check_patterns("exclude", exclude, parameters);
  Selection selection;
  std::unordered_map<const c10::TensorImpl*, std::string> seen;
  for (size_t i = 0; i < parameters.size(); ++i) {
    const auto& [name, value] = parameters[i];
    const auto leave = [&](std::string reason) {
      selection.left_alone.push_back({name, value.numel(), std::move(reason)});
    };
    const auto [first, is_new] = seen.emplace(value.unsafeGetTensorImpl(), name);
    const bool is_named = include.has_value() && std::find(include->begin(), include->end(), name) != include->end();
    if (!is_new) {
      leave(fmt::format("the same tensor as {}", first->second));
    } else if (include.has_value() && !matches_any(*include, name)) {
      leave("not included");
    } else if (matches_any(exclude, name)) {
      leave("excluded");
    } else if (!value.is_floating_point()) {
      leave("not floating point");
    } else if (value.dim() < 2 && !is_named) {
      leave("fewer than 2 dimensions");
    } else if (!include.has_value() && name.substr(name.rfind('.') + 1) != "weight") {
      leave("not called weight");
    } else if (value.numel() == 0) {
      leave("empty");
    } else {
      selection.chosen.push_back(i);
    }
  }
  TORCH_CHECK_VALUE(
      !selection.chosen.empty(),
      "[select_parameters] needs at least one parameter to prune (floating point, 2 or more dimensions), got ",
      "none among ", parameters.size(), " parameters");
  return selection;
}

}  // namespace rarefy::pruning
