// Registering operators without a derivative.
#pragma once

#include <ATen/core/LegacyTypeDispatch.h>

#include <utility>

namespace rarefy::ops {

/// The Autograd kernel of an operator without a derivative, or that only a backward pass calls: its results do not require
/// a gradient.
template <auto op>
struct NotDifferentiable;
template <typename Result, typename... Arguments, Result (*op)(Arguments...)>
struct NotDifferentiable<op> {
  static Result call(Arguments... arguments) {
    at::AutoDispatchBelowAutograd guard;
    return op(std::forward<Arguments>(arguments)...);
  }
};

}  // namespace rarefy::ops
