#pragma once

#include <c10/util/intrusive_ptr.h>
#include <rarefy/export.h>
#include <torch/nn/module.h>

#include <torch/csrc/distributed/c10d/ProcessGroup.hpp>

// Not part of rarefy/rarefy.h: it needs a LibTorch with c10d.
namespace rarefy::quantization {

/// The prepared layers of the model observe their activations over all processes of `group` from now on: each batch counts
/// as one with those of the others, so that quantizers stay equal in all processes. A batch that is not finite in one
/// process adds nothing to the range and is counted in all. Every process must run the same layers in the same order.
/// A null group ends it. The group must live as long as it is used.
/// Throws c10::ValueError when the model has no prepared layer.
RAREFY_API void set_process_group(torch::nn::Module& model, const c10::intrusive_ptr<c10d::ProcessGroup>& group);

}  // namespace rarefy::quantization
