#include "linalg.h"

#include <ATen/ops/addmm.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/eye.h>
#include <ATen/ops/linalg_cholesky_ex.h>
#include <ATen/ops/linalg_solve_triangular.h>
#include <ATen/ops/zeros.h>

#include <algorithm>
#include <array>
#include <cstring>
#if defined(__x86_64__)
#include <cpuid.h>
#endif

#include "ops/cpu/gradient_matmul.h"

namespace rarefy::linalg {
namespace {

constexpr int64_t kPanel = 512;  // columns whose products below the diagonal are computed in vain

bool is_amd() {
#if defined(__x86_64__)
  std::array<unsigned, 4> r{};
  if (__get_cpuid(0, &r[0], &r[1], &r[2], &r[3]) == 0) {
    return false;
  }
  std::array<char, 12> vendor{};
  std::memcpy(vendor.data(), &r[1], 4);
  std::memcpy(vendor.data() + 4, &r[3], 4);
  std::memcpy(vendor.data() + 8, &r[2], 4);
  return std::memcmp(vendor.data(), "AuthenticAMD", vendor.size()) == 0;
#else
  return false;
#endif
}

bool goes_to_onednn(const at::Tensor& c) {
  static const bool amd = is_amd();
  return amd && c.device().is_cpu() && c.scalar_type() == at::kFloat;
}

}  // namespace

void add_product(at::Tensor& c, const at::Tensor& a, const at::Tensor& b, double beta, double alpha) {
  if (c.numel() == 0) {
    return;
  }
  if (!goes_to_onednn(c) || a.numel() == 0) {
    c.addmm_(a, b, beta, alpha);
    return;
  }
  const auto product = ops::matmul_transposed(a, b.t());
  if (beta == 0.0) {
    c.copy_(product);
    if (alpha != 1.0) {
      c.mul_(alpha);
    }
  } else {
    if (beta != 1.0) {
      c.mul_(beta);
    }
    c.add_(product, alpha);
  }
}

void add_gram(at::Tensor& h, const at::Tensor& x, double beta, double alpha) {
  const int64_t n = h.size(0);
  for (int64_t begin = 0; begin < n; begin += kPanel) {
    const int64_t width = std::min(kPanel, n - begin);
    auto panel = h.narrow(0, begin, width).narrow(1, begin, n - begin);
    add_product(panel, x.narrow(1, begin, width).t(), x.narrow(1, begin, n - begin), beta, alpha);
  }
}

void mirror(at::Tensor& h) {
  const int64_t n = h.size(0);
  for (int64_t begin = 0; begin < n; begin += kPanel) {
    const int64_t width = std::min(kPanel, n - begin);
    const int64_t end = begin + width;
    auto diagonal = h.narrow(0, begin, width).narrow(1, begin, width);
    diagonal.copy_(diagonal.triu() + diagonal.triu(1).t());
    if (end < n) {
      h.narrow(0, end, n - end).narrow(1, begin, width).copy_(h.narrow(0, begin, width).narrow(1, end, n - end).t());
    }
  }
}

std::optional<at::Tensor> lower_factor(const at::Tensor& a) {
  auto [factor, info] = at::linalg_cholesky_ex(a);
  return info.item<int>() == 0 ? std::optional(factor) : std::nullopt;
}

std::optional<at::Tensor> inverse_factor(const at::Tensor& h) {
  const auto lower = lower_factor(h.flip({0, 1}));
  return lower.has_value() ? std::optional(inverse_of_upper(lower->flip({0, 1}))) : std::nullopt;
}

at::Tensor inverse_of_upper(const at::Tensor& r) {
  const int64_t n = r.size(0);
  if (n <= kPanel) {
    return at::linalg_solve_triangular(r, at::eye(n, r.options()), /*upper=*/true);
  }
  // [A B; 0 C]^-1 = [A^-1, -A^-1 B C^-1; 0, C^-1]
  const int64_t half = (n / 2 + 15) / 16 * 16;
  auto out = at::zeros({n, n}, r.options());
  const auto first = inverse_of_upper(r.narrow(0, 0, half).narrow(1, 0, half));
  const auto last = inverse_of_upper(r.narrow(0, half, n - half).narrow(1, half, n - half));
  out.narrow(0, 0, half).narrow(1, 0, half).copy_(first);
  out.narrow(0, half, n - half).narrow(1, half, n - half).copy_(last);
  auto product = at::empty({half, n - half}, r.options());
  add_product(product, first, r.narrow(0, 0, half).narrow(1, half, n - half), 0.0, 1.0);
  auto corner = out.narrow(0, 0, half).narrow(1, half, n - half);
  add_product(corner, product, last, 0.0, -1.0);
  return out;
}

Damped with_damping(double damping, double most, double mean_diagonal, const std::function<bool(double)>& attempt) {
  constexpr double kFirst = 1e-6, kTolerance = 1.000001;  // 0.1 * 10 is not 1 to the last bit
  for (double fraction = damping;; fraction = fraction == 0.0 ? kFirst : fraction * 10.0) {
    if (fraction > damping && fraction > most * kTolerance) {
      return {fraction, false};
    }
    if (attempt(fraction * mean_diagonal)) {
      return {fraction, true};
    }
  }
}

}  // namespace rarefy::linalg
