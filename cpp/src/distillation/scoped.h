#pragma once

#include <rarefy/distillation/model.h>

#include <optional>

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

/// Capture, and a mode unless it is the caller's; returns what ends both, in reverse.
inline Model::Restore enter_model(const Model& model, std::optional<bool> training) {
  const Model::Restore release = model.capture ? model.capture() : Model::Restore([] {});
  try {
    const Model::Restore restore =
        training.has_value() && model.enter_mode ? model.enter_mode(*training) : Model::Restore([] {});
    return [release, restore] {
      restore();
      release();
    };
  } catch (...) {
    release();
    throw;
  }
}

}  // namespace rarefy::distillation
