#pragma once

#include <rarefy/export.h>
#include <rarefy/pruning/criterion.h>

#include <cstdint>
#include <string>
#include <variant>

// How single weights are scored, larger = kept; element_score.h has the computation. The criteria are those of
// criterion.h, of which a unit of one element is left, and what exists for elements only.
namespace rarefy::pruning {

/// Movement away from zero: sum over passes of -w * g (Sanh et al., 2020, arXiv:2005.07683, equation 3, without the
/// learning rate, which orders nothing). Positive where training makes |w| grow.
struct RAREFY_API Movement {
  void validate() const {}
  std::string to_string() const;
  bool operator==(const Movement&) const = default;
};

/// | criterion  | score of a weight w with gradient g                                                 | needs      |
/// |------------|--------------------------------------------------------------------------------------|------------|
/// | Magnitude  | abs(w)^p, which over a block, row or filter sums to its L_p norm to the power of p;  |            |
/// |            | p = infinity is refused, since no sum gives a maximum                                |            |
/// | Random     | uniform in [0, 1), of the seed, the parameter's name and the element's index alone   |            |
/// | Movement   | sum of -w g                                                                          | gradients  |
/// | Taylor     | mean of abs(w g) over passes (Molchanov et al., 2019, arXiv:1906.10771)              | gradients  |
/// | Fisher     | mean of 1/2 (w g)^2 over passes: optimal brain damage with the empirical Fisher      | gradients  |
/// |            | diagonal for the Hessian (LeCun et al., 1990; Theis et al., 2018, arXiv:1801.05787)  |            |
/// | Lamp       | w^2 / sum of v^2 over abs(v) >= abs(w) of the tensor (Lee et al., 2021,              |            |
/// |            | arXiv:2010.07611); comparable over tensors, for global pruning                       |            |
/// | Activation | the norm of the input feature that w multiplies                                      | statistics |
using ElementCriterion = std::variant<Magnitude, Random, Movement, Taylor, Fisher, Lamp, Activation>;

/// Throws c10::ValueError when a field is out of range.
RAREFY_API void validate(const ElementCriterion& criterion);

/// As its constructor: "Magnitude(p=1)".
RAREFY_API std::string to_string(const ElementCriterion& criterion);

/// True for Movement, Taylor and Fisher: accumulate() has to see at least one backward pass.
RAREFY_API bool needs_gradients(const ElementCriterion& criterion);

}  // namespace rarefy::pruning
