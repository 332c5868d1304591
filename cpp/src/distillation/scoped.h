#pragma once

#include <rarefy/distillation/model.h>

namespace rarefy::distillation {

/// body(), then the way back, whatever happens.
/// Not a destructor's work: putting a model back may itself throw (a Python model interrupted by the user).
template <typename Body>
auto scoped(const Model::Restore& restore, const Body& body) {
  try {
    auto result = body();
    restore();
    return result;
  } catch (...) {
    restore();
    throw;
  }
}

}  // namespace rarefy::distillation
