// Output tensors whose pages are cheap to touch for the first time.
#pragma once

#include <ATen/core/Tensor.h>

namespace rarefy::ops {

/// at::empty_like(x) in x's own dense strides. A large CPU buffer asks for huge pages: a fresh 256 MiB output otherwise
/// spends most of its time in page faults (65,536 of 4 KiB against 128 of 2 MiB).
at::Tensor empty_for(const at::Tensor& x);

/// Whether writing `out` should go past the caches: it is so large that its beginning would be evicted before it is read.
bool bypasses_caches(const at::Tensor& out);

}  // namespace rarefy::ops
