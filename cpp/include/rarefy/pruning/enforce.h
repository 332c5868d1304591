#pragma once

#include <ATen/core/Tensor.h>
#include <rarefy/export.h>
#include <rarefy/masks.h>
#include <rarefy/pruning/state.h>

#include <cstdint>
#include <string>
#include <vector>

namespace torch::nn {
class Module;
}
namespace torch::optim {
class Optimizer;
}

// The one place where masks are enforced: on values, gradients and what optimizers keep. apply_masks(), for values and gradients, is declared with the
// state that it works on.
//
// All work of a call goes to the threads together. Functions that write do so without recording gradients; where they throw
// (a mask that does not fit its parameter: c10::ValueError that names it), nothing has changed.
namespace rarefy::pruning {

/// A tensor of a parameter's shape that an optimizer keeps: exp_avg, a momentum buffer.
struct RAREFY_API Moment {
  size_t parameter;  // position in PruningState::parameters
  at::Tensor value;
};

/// What the optimizer keeps about the parameters of the state, in their shapes; see optimizer_tensors() for what it throws.
/// One element is a step count, and left out.
RAREFY_API std::vector<Moment> moments_of(const PruningState& state, const torch::optim::Optimizer& optimizer);

/// Sets dense gradients to zero where masks prune: before optimizer.step(), pruned values and moments that are zero stay zero
/// under SGD, Adam and every other rule that maps zeros to zero. False when some gradient is sparse and was left as it is.
RAREFY_API bool mask_gradients(const PruningState& state);

/// Whether a step of the optimizer maps values, gradients and moments that are zero to zeros, so that nothing has to be
/// written after it: SGD, Adam, AdamW, RMSprop and Adagrad of LibTorch with eps > 0, and no class that is derived from them.
RAREFY_API bool keeps_zeros(const torch::optim::Optimizer& optimizer);

/// What differs when a tensor was replaced, or written to other than through data(). Keeps no memory of elements alive.
struct RAREFY_API TensorVersion {
  c10::weak_intrusive_ptr<c10::TensorImpl, c10::UndefinedTensorImpl> tensor;  // nobody else gets its address
  const void* data;
  int64_t version;
  bool operator==(const TensorVersion&) const = default;
};

/// Those of values, masks and moments.
RAREFY_API std::vector<TensorVersion> versions_of(const PruningState& state, const std::vector<Moment>& moments);

/// Sets values, and nothing else, to zero where masks prune.
RAREFY_API void apply_values(const PruningState& state);

/// Sets values, dense gradients and moments to zero where masks prune, each element at most once. Moments are floating point
/// of their parameter's shape, on any device.
RAREFY_API void enforce(const PruningState& state, const std::vector<Moment>& moments);

/// The same with the moments of an optimizer, or without any for null. Call it after optimizer.step():
///   for (...) { ...; optimizer.step(); enforce(state, &optimizer); }
RAREFY_API void enforce(const PruningState& state, const torch::optim::Optimizer* optimizer = nullptr);

/// The parameters of a model that have a mask beside them, found by its key; the step counter is zero. Throws c10::ValueError
/// for a mask without a parameter.
RAREFY_API PruningState masked_parameters(const torch::nn::Module& model);

// Models and their masks, whoever holds them: rarefy/masks.h.
using rarefy::check_masks;
using rarefy::remask;
using rarefy::remove_masks;
using rarefy::Stray;

/// The parameters with values that left their mask. Reads only.
RAREFY_API std::vector<Stray> stray_values(const PruningState& state);

/// check_masks() of the parameters of a state.
RAREFY_API void check_masks(const PruningState& state, const char* function = "check_masks");

}  // namespace rarefy::pruning
