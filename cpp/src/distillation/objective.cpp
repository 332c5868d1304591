#include <c10/util/Exception.h>
#include <rarefy/distillation/objective.h>

#include <cmath>
#include <set>

namespace rarefy::distillation {

Objective::Objective(std::vector<LossTerm> terms) : terms_(std::move(terms)) {
  TORCH_CHECK_VALUE(!terms_.empty(), "[Objective] there must be at least one term, got none");
  std::set<std::string> names;
  for (const auto& term : terms_) {
    TORCH_CHECK_VALUE(!term.name.empty(), "[Objective] a term must have a name, got an empty one");
    TORCH_CHECK_VALUE(names.insert(term.name).second, "[Objective] names of terms must differ, got '", term.name,
                      "' twice");
    TORCH_CHECK_VALUE(std::isfinite(term.weight), "[Objective] the weight of a term must be finite, got ", term.weight,
                      " for '", term.name, "'");
    TORCH_CHECK_VALUE(static_cast<bool>(term.function), "[Objective] the term '", term.name, "' must have a function");
  }
}

}  // namespace rarefy::distillation
