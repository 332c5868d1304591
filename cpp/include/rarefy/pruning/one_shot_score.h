#pragma once

#include <ATen/core/Tensor.h>
#include <rarefy/export.h>
#include <rarefy/pruning/selection.h>

#include <cstdint>
#include <functional>
#include <map>
#include <optional>
#include <string>
#include <vector>

namespace torch::nn {
class Module;
}

// Scores of single weights before or without training, larger = kept: one tensor of the weight's sizes per parameter,
// float32 (float64 for float64, and for SynFlow always). Nothing of a model changes: gradients, buffers, modes and requires_grad are as before,
// also when something throws.
namespace rarefy::pruning {

/// Scores by parameter name.
using ElementScores = std::map<std::string, at::Tensor>;

/// The loss of one batch, a scalar with its graph; called once or twice.
///
///   losses.push_back([=] { return torch::cross_entropy_loss(net->forward(x), y); });
using LossFunction = std::function<at::Tensor()>;

/// Connection sensitivity |w g| / sum |w g|, with g the gradient of the mean loss over the batches and the sum over all
/// parameters given (SNIP: Lee et al., 2019, arXiv:1810.02340, equation 5). Calls every loss once.
/// Throws c10::ValueError for no parameters, no losses, a loss that is not a finite scalar or depends on no parameter,
/// and for weights or gradients that are not finite.
RAREFY_API ElementScores snip(const std::vector<NamedParameter>& parameters, const std::vector<LossFunction>& losses);

/// w (H g), with g and H gradient and Hessian of the mean loss over the batches: how much of the gradient's norm, and so
/// of the loss's decrease at the next step, goes with the weight (GraSP: Wang et al., 2020, arXiv:2002.07376, equation
/// 8, whose scores are the negative of these and are removed from the largest on). Calls every loss twice and needs its
/// second derivative. The paper's temperature is the caller's: divide the logits by it. Throws as snip().
RAREFY_API ElementScores grasp(const std::vector<NamedParameter>& parameters, const std::vector<LossFunction>& losses);

struct RAREFY_API SynFlowOptions {
  double sparsity = 0.9;  // in [0, 1): what the scores are to be pruned to
  int64_t rounds = 100;   // >= 1

  /// Throws c10::ValueError when a field is out of range.
  void validate() const;
};

/// Synaptic flow theta * dR/dtheta of R = the sum of the output, in `rounds` rounds, after each of which the weights of
/// the smallest scores over all parameters are zero: a fraction of (1 - sparsity)^(k / rounds) remains after round k
/// (Tanaka et al., 2020, arXiv:2006.05467, algorithm 1). Returns the scores of the last round, 0 for what has been
/// pruned before: pruning them globally to `sparsity` gives the algorithm's mask, without layer collapse.
///   parameters  working copies, which are changed: non-negative leaves of the computation that require a gradient,
///               float64, since products over many layers leave the range of float32
///   forward     the network's output on an input of ones, by these copies
/// Throws c10::ValueError as snip(), and when the output does not depend on the parameters or is not finite.
RAREFY_API ElementScores synflow(const std::vector<NamedParameter>& parameters,
                                 const std::function<at::Tensor()>& forward, const SynFlowOptions& options = {});

/// The same for a module. Parameters are those that select_parameters() chooses.
RAREFY_API ElementScores snip(torch::nn::Module& model, const std::vector<LossFunction>& losses,
                              const std::optional<std::vector<std::string>>& include = std::nullopt,
                              const std::vector<std::string>& exclude = {});
RAREFY_API ElementScores grasp(torch::nn::Module& model, const std::vector<LossFunction>& losses,
                               const std::optional<std::vector<std::string>>& include = std::nullopt,
                               const std::vector<std::string>& exclude = {});

/// While it runs, the model is in evaluation mode and computes in float64 with the absolute values of its parameters and
/// with running means of zero, so that what flows is positive. Everything is exactly as before afterwards.
///   forward  the model's output for float64 inputs of ones
RAREFY_API ElementScores synflow(torch::nn::Module& model, const std::function<at::Tensor()>& forward,
                                 const SynFlowOptions& options = {},
                                 const std::optional<std::vector<std::string>>& include = std::nullopt,
                                 const std::vector<std::string>& exclude = {});

}  // namespace rarefy::pruning
