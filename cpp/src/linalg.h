// Products and factorizations of calibrated algorithms (SparseGPT, refit). The one place that knows which library
// computes them. float32 or float64, CPU unless said otherwise; arguments are checked by the callers.
#pragma once

#include <ATen/core/Tensor.h>

#include <functional>
#include <optional>

namespace rarefy::linalg {

/// c = beta c + alpha a b: [m, n], [m, k], [k, n], any strides whose last or last but one is 1. float32 goes to MKL or
/// oneDNN by the processor's maker (docs/dev/numerics.md): on AMD MKL reaches half of oneDNN's rate.
void add_product(at::Tensor& c, const at::Tensor& a, const at::Tensor& b, double beta, double alpha);

/// h = beta h + alpha x^T x in the upper triangle of h [n, n], in panels of columns; below it, whatever: see mirror().
/// x: [samples, n]. Any device.
void add_gram(at::Tensor& h, const at::Tensor& x, double beta, double alpha);

/// Copies the upper triangle to the lower one.
void mirror(at::Tensor& h);

/// Lower Cholesky factor; unset when `a` is not positive definite in its precision.
std::optional<at::Tensor> lower_factor(const at::Tensor& a);

/// The upper U with h^-1 = U^T U, the Cholesky factor of the inverse, by one factorization and one triangular inverse:
/// with P reversing the order, P h P = L L^T gives h = (P L P)(P L P)^T, and U is the inverse of P L P. Unset when h is
/// not positive definite in its precision.
std::optional<at::Tensor> inverse_factor(const at::Tensor& h);

/// The inverse of an upper triangular matrix, by halves.
at::Tensor inverse_of_upper(const at::Tensor& r);

/// What damping did.
struct Damped {
  double damping = 0;  // fraction of the mean diagonal that was added
  bool ok = false;
};

/// Calls attempt(value to add to the diagonal) with `damping` times `mean_diagonal`, and with ten times more as long as
/// it returns false, up to `most` times it. A damping of 0 goes on with 1e-6.
Damped with_damping(double damping, double most, double mean_diagonal, const std::function<bool(double)>& attempt);

}  // namespace rarefy::linalg
