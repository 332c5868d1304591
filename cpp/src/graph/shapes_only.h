#pragma once

#include <c10/core/impl/LocalDispatchKeySet.h>

namespace rarefy::graph {

/// While it lives, convolutions and matrix products on this thread give zeros of the right shape instead of computing:
/// what remains of a forward pass is its operators, which is all that dependency groups are read from. A model whose code
/// looks at values may take another way then; who uses this checks for it.
class ShapesOnly {
 public:
  ShapesOnly();

 private:
  c10::impl::IncludeDispatchKeyGuard guard_;
};

}  // namespace rarefy::graph
