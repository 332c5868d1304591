#pragma once

#include <ATen/core/Tensor.h>
#include <rarefy/export.h>
#include <rarefy/graph/record.h>

#include <cstdint>
#include <map>
#include <string>
#include <vector>

namespace torch::optim {
class Optimizer;
}

namespace rarefy::pruning {

/// What an optimizer keeps about a parameter: momentum, second moments, a step count.
struct RAREFY_API OptimizerTensor {
  std::string parameter;  // its name in the model
  std::string name;       // "exp_avg"
  at::Tensor value;
};

/// The indices that stay, ascending, of each dimension that loses some.
using Kept = std::map<int64_t, std::vector<int64_t>>;

/// The tensors that an optimizer keeps about the parameters given: those of SGD, Adam, AdamW, RMSprop and Adagrad. What it
/// keeps about other tensors is left alone.
/// Throws c10::ValueError for an optimizer that holds none of the parameters (it was made for another model), for LBFGS
/// once it has taken a step (its history is one vector over all parameters), and for an optimizer of another type.
RAREFY_API std::vector<OptimizerTensor> optimizer_tensors(const torch::optim::Optimizer& optimizer,
                                                          const std::vector<graph::NamedTensor>& parameters);

/// What a cut of a parameter cuts from a state tensor.
///   sizes  of the parameter, before the cut
///   state size                          cut
///   that of the parameter               as the parameter
///   one element                         nothing: a step count, a learning rate
///   as many dimensions, some of size 1  where the sizes are equal: factored moments (Adafactor in torch.optim)
///   one dimension less                  as the parameter without its last dimension (a name that ends in "row") or its
///                                       second to last ("col"); with other names the one that fits (Adafactor elsewhere)
/// Throws c10::ValueError for other shapes, and when several dimensions fit and give different cuts.
RAREFY_API Kept kept_of_state(const OptimizerTensor& state, at::IntArrayRef sizes, const Kept& kept);

}  // namespace rarefy::pruning
