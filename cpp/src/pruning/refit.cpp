#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/cholesky_solve.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/isfinite.h>
#include <c10/util/Exception.h>
#include <fmt/format.h>
#include <rarefy/pruning/calibrated.h>

#include <algorithm>
#include <vector>

#include "linalg.h"
#include "pruning/calibrated_checks.h"

namespace rarefy::pruning {
namespace {

/// One row of a group: values at the kept columns, from the Hessian and the row's product with it.
template <typename T>
class RowSolver {
 public:
  RowSolver(const at::Tensor& hessian, const at::Tensor& products, const RefitOptions& options)
      : hessian_(hessian), products_(products), options_(options), mean_(hessian.diagonal().mean().item<double>()) {}

  /// Writes the solution over the kept elements of `row` and zeros over the others; nothing of the kept ones when there
  /// is none. Gives the damping that it took.
  linalg::Damped solve(int64_t index, const uint8_t* keep, T* row) const {
    const int64_t features = hessian_.size(0);
    std::vector<int64_t> columns;
    for (int64_t i = 0; i < features; ++i) {
      if (keep[i] != 0) {
        columns.push_back(i);
      }
    }
    const auto kept = static_cast<int64_t>(columns.size());
    linalg::Damped damped{options_.damping, true};
    if (kept > 0 && kept < features) {
      damped = linalg::with_damping(options_.damping, options_.max_damping, mean_ > 0.0 ? mean_ : 1.0,
                                    [&](double added) { return attempt(index, columns, static_cast<T>(added), row); });
    }
    for (int64_t i = 0; i < features; ++i) {
      if (keep[i] == 0) {
        row[i] = 0;
      }
    }
    return damped;
  }

 private:
  bool attempt(int64_t index, const std::vector<int64_t>& columns, T added, T* row) const {
    const auto kept = static_cast<int64_t>(columns.size());
    const int64_t features = hessian_.size(0);
    auto matrix = at::empty({kept, kept}, hessian_.options());  // the lower triangle is read alone
    auto right = at::empty({kept, 1}, hessian_.options());
    const T* h = hessian_.template const_data_ptr<T>();
    const T* products = products_.template const_data_ptr<T>() + index * features;
    T* to = matrix.template mutable_data_ptr<T>();
    T* b = right.template mutable_data_ptr<T>();
    for (int64_t i = 0; i < kept; ++i) {
      const T* from = h + columns[static_cast<size_t>(i)] * features;
      for (int64_t j = 0; j <= i; ++j) {
        to[i * kept + j] = from[columns[static_cast<size_t>(j)]];
      }
      for (int64_t j = i + 1; j < kept; ++j) {
        to[i * kept + j] = 0;
      }
      to[i * kept + i] += added;
      // (H + added) w at the kept columns: damping draws towards w.
      b[i] = products[columns[static_cast<size_t>(i)]] + added * row[columns[static_cast<size_t>(i)]];
    }
    const auto factor = linalg::lower_factor(matrix);
    if (!factor.has_value()) {
      return false;
    }
    const auto solution = at::cholesky_solve(right, *factor).contiguous();
    if (!at::isfinite(solution).all().item<bool>()) {
      return false;
    }
    const T* values = solution.template const_data_ptr<T>();
    for (int64_t i = 0; i < kept; ++i) {
      row[columns[static_cast<size_t>(i)]] = values[i];
    }
    return true;
  }

  at::Tensor hessian_, products_;
  RefitOptions options_;
  double mean_;
};

}  // namespace

void RefitOptions::validate() const { check_damping("refit", damping, max_damping); }

CalibratedWeight refit(const std::string& name, const at::Tensor& weight, const at::Tensor& mask,
                       const at::Tensor& hessian, const RefitOptions& options) {
  options.validate();
  const at::NoGradGuard no_grad;
  const auto statistics = checked_statistics("refit", name, weight, hessian, 2);
  TORCH_CHECK_VALUE(mask.defined() && mask.scalar_type() == at::kBool && mask.sizes() == weight.sizes(),
                    "[refit] the mask of '", name, "' must be bool of sizes ", weight.sizes(), ", got ",
                    mask.defined() ? mask.scalar_type() : at::ScalarType::Undefined, " and ",
                    mask.defined() ? mask.sizes() : at::IntArrayRef());
  const int64_t groups = statistics.size(0);
  auto rows = grouped_rows("refit", name, weight, groups, statistics.scalar_type());
  const auto keep = mask.to(at::kCPU).contiguous().view(rows.sizes());
  const int64_t per_group = rows.size(1), features = rows.size(2);
  std::vector<double> damping(static_cast<size_t>(per_group), 0.0);
  std::vector<uint8_t> failed(static_cast<size_t>(per_group), 0);
  int64_t unsolved = 0, raised = 0;
  CalibratedWeight out;
  for (int64_t group = 0; group < groups; ++group) {
    auto products = at::empty({per_group, features}, rows.options());
    linalg::add_product(products, rows[group], statistics[group], 0.0, 1.0);
    AT_DISPATCH_FLOATING_TYPES(rows.scalar_type(), "refit", [&] {
      const RowSolver<scalar_t> solver(statistics[group], products, options);
      auto* const values = rows[group].template mutable_data_ptr<scalar_t>();
      const auto* const kept = static_cast<const uint8_t*>(keep[group].const_data_ptr());
      // Rows are independent: one thread each, and one thread in each factorization.
      at::parallel_for(0, per_group, 1, [&](int64_t begin, int64_t end) {
        for (int64_t row = begin; row < end; ++row) {
          const auto damped = solver.solve(row, kept + row * features, values + row * features);
          damping[static_cast<size_t>(row)] = damped.damping;
          failed[static_cast<size_t>(row)] = damped.ok ? 0 : 1;
        }
      });
    });
    for (size_t row = 0; row < damping.size(); ++row) {
      unsolved += failed[row];
      if (failed[row] == 0) {
        raised += damping[row] > options.damping ? 1 : 0;
        out.damping = std::max(out.damping, damping[row]);
      }
    }
  }
  if (raised > 0) {
    add_note(out.note, fmt::format("damping raised up to {:g} in {} of {} rows", out.damping, raised, weight.size(0)));
  }
  if (unsolved > 0) {
    add_note(out.note, fmt::format("{} of {} rows keep their weights: not positive definite at a damping of {:g}",
                                   unsolved, weight.size(0), options.max_damping));
  }
  out.weight = ungrouped(rows, weight);
  out.mask = mask.clone(at::MemoryFormat::Contiguous);
  return out;
}

}  // namespace rarefy::pruning
