#pragma once

#include <ATen/core/Tensor.h>
#include <rarefy/export.h>
#include <rarefy/graph/record.h>
#include <rarefy/pruning/optimizer_state.h>
#include <rarefy/pruning/pattern.h>
#include <rarefy/pruning/selection.h>
#include <rarefy/pruning/structure.h>
#include <rarefy/pruning/structured.h>

#include <cstdint>
#include <functional>
#include <optional>
#include <string>
#include <vector>

// Channel permutation: which channels stand beside each other decides what N:M must prune. The channels of a dependency
// group can be put in any order, as long as everything that writes or reads them follows: the model computes the same,
// and its N:M masks keep more (Pool & Yu, 2021, "Channel Permutations for N:M Sparsity", NeurIPS).
namespace rarefy::pruning {

struct RAREFY_API PermutationOptions {
  NM pattern = {};
  /// The weights whose N:M masks count; see select_parameters(). Those that cannot have the pattern do not count.
  std::optional<std::vector<std::string>> include = std::nullopt;
  std::vector<std::string> exclude = {};
  int64_t escapes = 16;  // attempts of each group to leave a local maximum, >= 0
  double effort = 2e10;  // comparisons of magnitudes for a group, about 7e9 a second on one core
  uint64_t seed = 0;
  double tolerance = 0;  // of the outputs, see StructuredOptions::tolerance

  /// Throws c10::ValueError when a field is out of range.
  void validate() const;
};

/// The order of a group's units.
struct RAREFY_API GroupOrder {
  std::string name;  // of the group
  int64_t units = 0;
  std::vector<int32_t> order;        // order[u] is the unit that comes to the place of unit u; empty: all stay
  std::vector<std::string> weights;  // whose N:M masks depend on the order
  double before = 0, after = 0;      // the magnitude that N:M keeps of these weights
  std::string reason;                // why all stay; empty when they do not

  std::string to_string() const;
};

struct RAREFY_API PermutationReport {
  NM pattern;
  std::vector<GroupOrder> groups;
  double total = 0;              // the magnitude of all weights that count
  double before = 0, after = 0;  // what N:M keeps of it
  double difference = 0;         // largest of the outputs, over the largest output; 0 before they were compared
  int64_t attempts = 0;          // comparisons of outputs

  std::string to_string() const;
};

/// The sum of |w| that an N:M mask along dimension 1 keeps.
RAREFY_API double nm_kept_magnitude(const at::Tensor& weight, const NM& pattern);

/// Looks for orders in which N:M keeps more; nothing is changed. Groups one after the other, each with what is decided
/// already: greedy exchanges of the best pair of units until none gains, then random exchanges and the same again. What
/// is kept never becomes less. The result is a function of the weights and the options: it does not depend on time or
/// threads.
///   parameters  all of the model's, by the names of the structure
/// Throws c10::ValueError for an option out of range, a pattern of names that matches nothing, and for NaN or infinity
/// in a weight that counts.
RAREFY_API PermutationReport find_nm_permutation(const Structure& structure,
                                                 const std::vector<NamedParameter>& parameters,
                                                 const PermutationOptions& options = {});

/// Index i of dimension `dim` becomes what index source[i] was.
struct RAREFY_API Reorder {
  std::string tensor;
  int64_t dim = 0;
  std::vector<int64_t> source;
};

/// What the orders of groups (one per group of the structure) do to tensors: the k-th index of a unit takes the place of
/// the k-th index of the other. One entry per tensor and dimension that changes.
RAREFY_API std::vector<Reorder> reorders(const Structure& structure, const std::vector<GroupOrder>& groups);

/// A model as the permutation sees it, in either language.
struct RAREFY_API PermutableModel {
  std::function<Recording()> record;        // runs the model on example inputs, with values
  std::vector<graph::NamedTensor> tensors;  // its parameters and buffers, a shared one under each of its names
  std::vector<OptimizerTensor> state;       // what optimizers keep about parameters
  /// Further tensors that go along with those given, which the recording does not use: ranges of fake quantizers. In a
  /// Cut, `kept` is the new order. May be unset.
  std::function<std::vector<Cut>(const std::vector<Cut>&)> also = nullptr;
};

/// Permutes a model in place, in a transaction that both languages share: record, group, search, permute parameters,
/// buffers, gradients and optimizer state, run, compare. Where the outputs differ by more than rounding, everything is
/// put back, and groups are tried one by one: those that fail stay as they are, with the reason in the report. Shapes,
/// identities and memory of all tensors stay. Throws, with the model as it was, what find_nm_permutation() throws, and
/// c10::ValueError for a model that does not run or has masks of a MagnitudePruner: permute first, prune second.
RAREFY_API PermutationReport permute_for_nm(const PermutableModel& model, const PermutationOptions& options = {});

/// The same for a torch::nn model.
///   forward  runs the model on example inputs and returns its outputs; called in evaluation mode under no-grad
///   inputs   the tensors that forward() feeds to the model
RAREFY_API PermutationReport permute_for_nm(torch::nn::Module& model, std::function<std::vector<at::Tensor>()> forward,
                                            std::vector<at::Tensor> inputs, const PermutationOptions& options = {},
                                            const std::vector<torch::optim::Optimizer*>& optimizers = {});

}  // namespace rarefy::pruning
