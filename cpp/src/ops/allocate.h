// Output tensors whose pages are cheap to touch for the first time.
#pragma once

#include <ATen/core/Tensor.h>

namespace rarefy::ops {

/// at::empty_like(x) in x's own dense strides. A large CPU buffer asks for huge pages: a fresh 256 MiB output otherwise
/// spends most of its time in page faults (65,536 of 4 KiB against 128 of 2 MiB).
at::Tensor empty_for(const at::Tensor& x);

}  // namespace rarefy::ops
