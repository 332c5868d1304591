#pragma once

#include <ATen/core/Tensor.h>
#include <rarefy/export.h>
#include <rarefy/pruning/criterion.h>
#include <rarefy/pruning/structure.h>

#include <functional>
#include <map>
#include <string>
#include <utility>
#include <vector>

namespace torch::nn {
class Module;
}

namespace rarefy::pruning {

/// The parameter of a name; an undefined tensor for what is none (a buffer), which is not scored.
using ParameterLookup = std::function<at::Tensor(const std::string&)>;

/// Parameters of a module by path.
RAREFY_API ParameterLookup parameter_lookup(const torch::nn::Module& model);

/// A value for each index of a dimension of a tensor, by tensor and dimension.
using Statistics = std::map<std::pair<std::string, int64_t>, at::Tensor>;

/// The scores of a group's units: float64 [units] on the CPU, larger is more important. Undefined when the criterion
/// says nothing about the group; it is then left alone for the reason given.
struct RAREFY_API GroupScore {
  at::Tensor values;
  std::string reason;
};

/// Scores every unit of every group. For each member that takes part, the criterion gives a value per unit from all of
/// the unit's slices; reduction combines the members, and normalization makes groups comparable.
///   parameters  values, and for Taylor and Fisher their gradients. All floating-point types, any device; computed in
///               float32, or float64 for float64, and summed over units and members in float64
///   statistics  for Activation: of one or more members of each group
/// Members that take part, as all coupled layers do in arXiv:2301.12900: for Magnitude, Taylor, Fisher and Lamp weights
/// of 2 or more dimensions, by rows and by columns, and scales of normalizations (of affine members those named weight,
/// gamma or scale); in a group that has neither, all its parameters. For GeometricMedian those of role output, or if
/// there are none all. Biases, shifts and running statistics take no part.
/// Throws c10::ValueError for a parameter that is not finite, before anything else is computed; when a shape does not
/// fit the structure; for a parameter without a gradient that is needed; and when no group at all has a score.
RAREFY_API std::vector<GroupScore> importance(const Structure& structure, const ParameterLookup& parameters,
                                              const ImportanceOptions& options = {}, const Statistics& statistics = {});

/// Scores of the caller's own: `score` gives one value per unit of a group, normalized as the others.
/// Throws c10::ValueError when a result is not 1-D, has another size, or is not finite.
RAREFY_API std::vector<GroupScore> importance(const Structure& structure,
                                              const std::function<at::Tensor(const Group&)>& score,
                                              Normalization normalization = Normalization::mean);

/// The mean of Fisher over backward passes:
///
///   FisherAccumulator fisher(structure);
///   for (...) { model->zero_grad(); loss(...).backward(); fisher.update(parameter_lookup(*model)); }
///   auto scores = fisher.importance();
///
/// With the gradients of single samples the mean is the empirical Fisher information; with those of batches it is that
/// of the batch loss, the usual approximation.
class RAREFY_API FisherAccumulator {
 public:
  explicit FisherAccumulator(Structure structure);

  /// Adds the gradients that are there. Throws what importance() does; then nothing is added.
  void update(const ParameterLookup& parameters);

  /// How often update() ran.
  int64_t batches() const { return batches_; }

  /// Throws c10::ValueError before the first update().
  std::vector<GroupScore> importance(Reduction reduction = Reduction::mean,
                                     Normalization normalization = Normalization::mean) const;

 private:
  Structure structure_;
  std::vector<std::vector<std::vector<double>>> sums_;  // of each group and member that takes part: per unit
  int64_t batches_ = 0;
};

}  // namespace rarefy::pruning
