// Weights in the layout of their kernel, kept beside the plain tensors that modules hold.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/FunctionRef.h>

#include <cstdint>
#include <vector>

namespace rarefy::ops {

/// The packed form of a weight, made by `pack` once and kept while the weight's memory lives and is not written to.
///   how         what else the form depends on
///   input_size  what the form is best for; a weight has four of them at most, and then serves other sizes with the first
/// A weight is known by its memory, offset, sizes, strides and version. Writing through Tensor.data changes no version, as
/// everywhere in torch. Inference tensors have none: they are packed at every call. Safe to call from several
/// threads, of which one packs while others wait.
at::Tensor packed_weight(const at::Tensor& weight, at::IntArrayRef how, at::IntArrayRef input_size,
                         c10::function_ref<at::Tensor()> pack);

}  // namespace rarefy::ops
