#pragma once

#include <ATen/core/Tensor.h>
#include <rarefy/export.h>
#include <rarefy/pruning/pattern.h>

#include <cstdint>
#include <optional>
#include <string>

// Pruning of one weight by what its inputs look like: masks, and values for what is kept. calibration.h goes through a
// model with it.
//
// A weight is [out, in] or [out, in / groups, kernel...] of float32, float64, bfloat16 or float16. What belongs to its
// inputs comes from a HessianAccumulator: per group, features in the order of weight.flatten(1); with one group the
// first dimension may be left out. Computed on the CPU, in float64 when the statistics are and in float32 otherwise.
namespace rarefy::pruning {

/// A weight that was pruned, and its mask: bool, true = kept, of the weight's sizes.
struct RAREFY_API CalibratedWeight {
  at::Tensor weight;   // of the type, device and sizes of the one given; zero where the mask is false
  at::Tensor mask;     // on its device
  double damping = 0;  // the largest that was used in a group, as a fraction of the mean of the Hessian's diagonal
  std::string note;    // what is worth knowing: rows that could not be solved, damping that was raised
};

struct RAREFY_API WandaOptions {
  std::optional<double> sparsity = std::nullopt;  // in [0, 1); unset: 0.5, or that of N:M, which it must be
  Pattern pattern = Unstructured{};               // or N:M

  /// Throws c10::ValueError when a field is out of range.
  void validate() const;
};

/// Wanda: keeps the largest |w_ij| * norm_j within each output (Sun et al., 2024, arXiv:2306.11695): in every row, or in
/// every group of N:M. round_half_even(sparsity * features) elements of each row are pruned; of equal scores the earlier
/// one. Kept weights stay as they are.
///   name   of the weight, for messages
///   norms  of the input features, [groups, features] or [features]
/// Throws c10::ValueError for sizes that do not fit, for NaN or infinity, and for another pattern.
RAREFY_API CalibratedWeight wanda(const std::string& name, const at::Tensor& weight, const at::Tensor& norms,
                                  const WandaOptions& options = {});

struct RAREFY_API SparseGptOptions {
  std::optional<double> sparsity = std::nullopt;  // as in WandaOptions
  Pattern pattern = Unstructured{};
  int64_t block = 128;     // columns whose masks are chosen together, >= 1; groups of N:M are not cut
  double damping = 0.01;   // >= 0, of the mean of the diagonal, added to the diagonal
  double max_damping = 1;  // it grows tenfold up to this while the Hessian is not positive definite

  void validate() const;
};

/// SparseGPT: column by column, what is pruned is made up for by the columns to its right, with the inverse of the
/// Hessian by optimal brain surgery (Frantar & Alistarh, 2023, arXiv:2301.00774). With U the Cholesky factor of the
/// inverse, U^T U = (H + damping)^-1, pruning w_ij costs (w_ij / U_jj)^2 and takes w_ij / U_jj * U_j from the row. Of every
/// block of columns, or group of N:M, the cheapest elements are pruned, over all rows of a group of outputs;
/// exactly round_half_even(sparsity * elements) in all. Inputs that were always zero cost nothing and are pruned first.
///   hessian  [groups, features, features] or [features, features], symmetric
/// Throws c10::ValueError as wanda(), and when the Hessian is not positive definite at max_damping, naming the weight.
RAREFY_API CalibratedWeight sparse_gpt(const std::string& name, const at::Tensor& weight, const at::Tensor& hessian,
                                       const SparseGptOptions& options = {});

struct RAREFY_API RefitOptions {
  double damping = 1e-4;  // as in SparseGptOptions; towards the weights that are fitted, not towards zero
  double max_damping = 1;

  void validate() const;
};

/// The values of the kept weights that come nearest to the outputs of the given ones, by least squares: for a row w with
/// kept columns S, the v on S that minimizes (v - w) H (v - w)^T + damping |v - w|^2, by a Cholesky factorization of H
/// at S (cf. Hassibi & Stork, 1992). Exact for any mask, where SparseGPT's passes are not: earlier columns are
/// not changed by what is pruned later.
///   weight  dense; mask: bool, true = kept, of its sizes
/// A row that cannot be solved at max_damping keeps its weights, with a note. Throws as sparse_gpt() otherwise.
/// Time is that of one factorization of the kept columns per row: kept^3 / 3 multiplications each.
RAREFY_API CalibratedWeight refit(const std::string& name, const at::Tensor& weight, const at::Tensor& mask,
                                  const at::Tensor& hessian, const RefitOptions& options = {});

/// ||(W - W') X||^2 / ||W X||^2 over the inputs that the Hessian is of: the fraction of the output's energy that is
/// lost. 0 when there is no output at all and nothing is lost. Throws c10::ValueError for sizes that do not fit.
RAREFY_API double relative_error(const at::Tensor& weight, const at::Tensor& pruned, const at::Tensor& hessian);

}  // namespace rarefy::pruning
