#pragma once

#include <ATen/core/Tensor.h>
#include <rarefy/export.h>
#include <rarefy/pruning/pattern.h>

#include <cstdint>
#include <string>
#include <utility>
#include <vector>

// Which elements of which weights a mask prunes: a pure function of weights or scores, existing masks and a choice.
namespace rarefy::pruning {

/// What competes for being kept.
enum class Scope {
  local,   // the elements of each tensor; every tensor gets the same sparsity
  global,  // those of all tensors together
  erk,     // the elements of each tensor; tensors get the sparsities of erk_sparsities()
};

/// "local", "global" or "erk". Throws c10::ValueError for anything else.
RAREFY_API Scope parse_scope(const std::string& name);
RAREFY_API const char* name(Scope scope);

/// A weight whose elements compete.
struct RAREFY_API Candidate {
  std::string name;
  at::Tensor value;  // float32, float64, bfloat16 or float16, any strides
  at::Tensor score;  // of the same shape and device, of any of these types: higher is kept. Undefined: |value|
  at::Tensor mask;   // packed (see rarefy/ops/mask.h): what it prunes stays pruned. Undefined: all kept
};

struct RAREFY_API MaskChoice {
  double sparsity = 0.5;  // the fraction of elements to prune, in [0, 1)
  Scope scope = Scope::global;
  Pattern pattern = Unstructured{};
  /// Own sparsities, in [0, 1), of weights that a pattern names (see select_parameters()). They leave the scope: the
  /// others have `sparsity` among themselves. The first pattern that fits a name counts.
  std::vector<std::pair<std::string, double>> layers = {};
  bool regrow = false;  // true: masks are ignored, so that what they prune competes again

  /// Throws c10::ValueError when a field is out of range, when a sparsity is above that of N:M, and for N:M with ERK:
  /// every layer has the sparsity 1 - n / m.
  void validate() const;
};

/// Packed masks, one per candidate. How many elements are pruned, of the `total` elements of what competes:
///
///   unstructured  exactly round_half_even(sparsity * total).
///   N:M           exactly round_half_even(sparsity * total), of the elements that are not among the n largest of their
///                 group; all of those when the sparsity is 1 - n / m. So on the way of a schedule more and more groups
///                 reach n of m, the least important elements first (cf. arXiv:2209.07617), and the last masks are N:M.
///                 With sizes that m does not divide, a tensor has a little less to prune than (1 - n / m) * total, and
///                 the count is that fraction of what it has: round_half_even(sparsity / (1 - n / m) * prunable).
///   others        whole units, of the lowest mean score of an element: as many as come nearest to sparsity * total
///                 elements; of two that are equally near, an even number. With units of one size these are exactly
///                 round_half_even(sparsity * units). The mean is a float64 sum in the order of elements, over those
///                 that the mask keeps; a unit of which nothing is kept is pruned already.
///
/// What masks prune already counts towards the number; when it is more, they come back unchanged (N:M: with what its
/// groups still lack). Of equal scores the earlier one is pruned: in the order of candidates, then of elements or units.
/// -0 equals 0, infinities are the largest and smallest. Results do not depend on the number of threads, the
/// instruction set or the memory format.
///
/// Weights may lie on any device, those that compete with each other on one. Throws c10::ValueError for a choice out of
/// range, a pattern in `layers` that names nothing, a weight that cannot have the pattern (misfit()), shapes and devices
/// that differ, a mask of another size, and NaN, naming the weight.
RAREFY_API std::vector<at::Tensor> choose_masks(const std::vector<Candidate>& candidates, const MaskChoice& choice);

/// How many elements of each tensor are pruned so that the tensors together have exactly
/// round_half_even(sparsity * elements) zeros and that the density of each is proportional to
///
///   (sum of its sizes) / (product of its sizes)
///
/// (Erdos-Renyi-Kernel: Evci et al., 2020, arXiv:1911.11134, section 3; (in + out) / (in * out) for a linear layer). A
/// tensor whose density would be above 1 is dense, and the others share the rest. Numbers are rounded by largest
/// remainders, of equal ones the earlier tensor keeps one more. Throws c10::ValueError for a sparsity outside [0, 1).
RAREFY_API std::vector<int64_t> erk_counts(const std::vector<std::vector<int64_t>>& sizes, double sparsity);

/// erk_counts() as fractions of each tensor; 0 for one without elements.
RAREFY_API std::vector<double> erk_sparsities(const std::vector<std::vector<int64_t>>& sizes, double sparsity);

}  // namespace rarefy::pruning
