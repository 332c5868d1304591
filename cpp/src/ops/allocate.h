// Memory for large results of CPU kernels, reused from step to step.
//
// A training step asks for the same sizes again and again, and malloc gives large blocks back to the system in between:
// every page is then mapped and zeroed again at its first touch, which costs several times as much as filling it. Blocks
// that come from here are kept when their tensor is freed, up to a total of kCacheBytes, the least recently freed going
// first. Underneath is torch's own CPU allocator.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstddef>

namespace rarefy::ops {

/// Most bytes that are kept while no tensor uses them.
constexpr size_t kCacheBytes = size_t{1} << 30;

/// An uninitialized tensor with the dtype, sizes and strides of x, which is dense and on the CPU.
at::Tensor empty_for(const at::Tensor& x);
/// The same with another dtype.
at::Tensor empty_for(const at::Tensor& x, at::ScalarType type);

/// An uninitialized contiguous CPU tensor.
at::Tensor empty_cached(at::IntArrayRef sizes, at::ScalarType type);

/// Gives the blocks that no tensor uses back to the system, and says how many bytes that were.
size_t release_cached_memory();

}  // namespace rarefy::ops
