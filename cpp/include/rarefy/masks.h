#pragma once

#include <ATen/core/Tensor.h>
#include <rarefy/export.h>

#include <cstdint>
#include <string>
#include <vector>

namespace torch::nn {
class Module;
}

// A model with pruning masks, as everything that saves, averages or converts models sees it: parameters that have a packed
// mask (rarefy/ops/mask.h) in a buffer "<parameter>_mask_bits" beside them. What makes masks is in rarefy/pruning.
namespace rarefy {

/// A parameter and its mask.
struct RAREFY_API MaskedTensor {
  std::string name;
  at::Tensor value;
  at::Tensor mask;
};

/// The parameters of a model that have a mask beside them. Throws c10::ValueError for a mask without a parameter.
RAREFY_API std::vector<MaskedTensor> masked_tensors(const torch::nn::Module& model);

/// Throws c10::ValueError that names a parameter whose mask does not fit it: another size, type or device.
RAREFY_API void check_fit(const std::vector<MaskedTensor>& tensors);

/// Pruned values that are not zero.
struct RAREFY_API Stray {
  std::string parameter;
  int64_t count;
  int64_t first;  // flat index, in logical order
};

/// Those with values that left their mask. Reads only. Throws c10::ValueError for a mask that does not fit.
RAREFY_API std::vector<Stray> stray_values(const std::vector<MaskedTensor>& tensors);

/// Throws c10::ValueError when values left their mask: names the first such parameter, the number of its values and the
/// first index. Functions of rarefy that save a model call it. `function` begins the message.
RAREFY_API void check_masks(const std::vector<MaskedTensor>& tensors, const char* function = "check_masks");
RAREFY_API void check_masks(const torch::nn::Module& model, const char* function = "check_masks");

/// Sets pruned values of a model to zero again: after a merge of adapters, an average of models, loaded dense weights.
/// Returns how many were not zero.
RAREFY_API int64_t remask(torch::nn::Module& model);

/// Takes masks, what pruners keep beside them and the step counter out of a model, whose zeros are no longer held from then
/// on: what convert() does. A pruner over the model must not be used any more; where there is one, its finalize() is the same.
RAREFY_API void remove_masks(torch::nn::Module& model);

}  // namespace rarefy
