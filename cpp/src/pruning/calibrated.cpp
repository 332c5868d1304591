#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/ones.h>
#include <c10/util/Exception.h>
#include <rarefy/ops/mask.h>
#include <rarefy/pruning/calibrated.h>

#include <algorithm>
#include <cmath>

#include "linalg.h"
#include "ops/mask_checks.h"
#include "pruning/calibrated_checks.h"
#include "pruning/finite.h"
#include "pruning/smallest.h"

namespace rarefy::pruning {

double resolved_sparsity(const char* function, std::optional<double> sparsity, const Pattern& pattern) {
  std::visit([](const auto& p) { p.validate(); }, pattern);
  const bool is_nm = std::holds_alternative<NM>(pattern);
  TORCH_CHECK_VALUE(is_nm || std::holds_alternative<Unstructured>(pattern), "[", function,
                    "] pattern must be unstructured or n:m, got '", short_name(pattern), "'");
  const double otherwise = is_nm ? *implied_sparsity(pattern) : 0.5;
  const double value = sparsity.value_or(otherwise);
  TORCH_CHECK_VALUE(value >= 0.0 && value < 1.0, "[", function, "] sparsity must be in [0, 1), got ", value);
  TORCH_CHECK_VALUE(!is_nm || std::abs(value - otherwise) < 1e-9, "[", function, "] sparsity of ", short_name(pattern),
                    " must be unset or ", otherwise, ", got ", value);
  return value;
}

void check_damping(const char* function, double damping, double most) {
  TORCH_CHECK_VALUE(damping >= 0.0 && damping <= most && std::isfinite(most), "[", function,
                    "] must have 0 <= damping <= max_damping, got ", damping, " and ", most);
}

at::Tensor grouped_rows(const char* function, const std::string& name, const at::Tensor& weight, int64_t groups,
                        at::ScalarType type) {
  TORCH_CHECK_VALUE(weight.defined() && weight.is_floating_point() && weight.dim() >= 2 && weight.numel() > 0, "[",
                    function, "] a weight must be floating point and of 2 or more dimensions, got '", name, "' of ",
                    weight.defined() ? weight.scalar_type() : at::ScalarType::Undefined, " and sizes ",
                    weight.defined() ? weight.sizes() : at::IntArrayRef());
  const auto values = weight.detach();
  TORCH_CHECK_VALUE(is_finite(values), "[", function, "] weights must be finite, got NaN or infinity in '", name, "'");
  return values.to(at::kCPU, type, /*non_blocking=*/false, /*copy=*/true)
      .contiguous()
      .view({groups, weight.size(0) / groups, weight.numel() / weight.size(0)});
}

at::Tensor checked_statistics(const char* function, const std::string& name, const at::Tensor& weight,
                              const at::Tensor& statistics, int64_t dims) {
  const int64_t features =
      weight.defined() && weight.dim() >= 2 && weight.numel() > 0 ? weight.numel() / weight.size(0) : -1;
  TORCH_CHECK_VALUE(features > 0, "[", function, "] a weight must be of 2 or more dimensions, got '", name,
                    "' of sizes ", weight.defined() ? weight.sizes() : at::IntArrayRef());
  const char* what = dims == 1 ? "norms of input features" : "a Hessian";
  TORCH_CHECK_VALUE(statistics.defined() && statistics.is_floating_point(), "[", function, "] '", name, "' needs ",
                    what, " of a floating-point type");
  const auto with_groups = statistics.dim() == dims ? statistics.unsqueeze(0) : statistics;
  bool fits = with_groups.dim() == dims + 1 && with_groups.size(0) >= 1 && weight.size(0) % with_groups.size(0) == 0;
  for (int64_t d = 1; fits && d <= dims; ++d) {
    fits = with_groups.size(d) == features;
  }
  TORCH_CHECK_VALUE(fits, "[", function, "] '", name, "' of sizes ", weight.sizes(), " needs ", what, " of ", features,
                    " input features per group, got sizes ", statistics.sizes());
  const auto values = with_groups.detach();
  TORCH_CHECK_VALUE(is_finite(values), "[", function, "] what is known of the inputs of '", name,
                    "' must be finite, got NaN or infinity");
  return values.to(at::kCPU, values.scalar_type() == at::kDouble ? at::kDouble : at::kFloat).contiguous();
}

at::Tensor ungrouped(const at::Tensor& rows, const at::Tensor& weight) {
  return rows.view(weight.sizes()).to(weight.device(), weight.scalar_type());
}

void add_note(std::string& note, const std::string& more) {
  if (!more.empty()) {
    note += note.empty() ? more : "; " + more;
  }
}

void WandaOptions::validate() const { resolved_sparsity("wanda", sparsity, pattern); }

CalibratedWeight wanda(const std::string& name, const at::Tensor& weight, const at::Tensor& norms,
                       const WandaOptions& options) {
  const double sparsity = resolved_sparsity("wanda", options.sparsity, options.pattern);
  const at::NoGradGuard no_grad;
  const auto statistics = checked_statistics("wanda", name, weight, norms, 1);
  const auto reason = misfit(options.pattern, weight.sizes());
  TORCH_CHECK_VALUE(reason.empty(), "[wanda] '", name, "': ", reason);
  const auto type = statistics.scalar_type();
  auto rows = grouped_rows("wanda", name, weight, statistics.size(0), type);
  const auto scores = rows.abs().mul_(statistics.unsqueeze(1));
  CalibratedWeight out;
  if (const auto* nm = std::get_if<NM>(&options.pattern)) {
    out.mask = ops::unpack_mask(ops::nm_mask(scores.view(weight.sizes()), nm->n, nm->m, 1, std::nullopt, false),
                                weight.sizes());
  } else {
    out.mask = at::empty(weight.sizes(), at::TensorOptions(at::kBool));
    auto* keep = static_cast<uint8_t*>(out.mask.mutable_data_ptr());
    const int64_t features = rows.size(2);
    const int64_t pruned = ops::elements_to_prune(sparsity, features);
    AT_DISPATCH_FLOATING_TYPES(type, "wanda", [&] {
      const auto* from = scores.const_data_ptr<scalar_t>();
      at::parallel_for(0, weight.size(0), std::max<int64_t>(1, 8192 / features), [&](int64_t begin, int64_t end) {
        for (int64_t row = begin; row < end; ++row) {
          keep_all_but_smallest(from + row * features, features, pruned, keep + row * features);
        }
      });
    });
  }
  out.mask = out.mask.to(weight.device());
  out.weight = weight.detach().clone(at::MemoryFormat::Contiguous).masked_fill_(out.mask.logical_not(), 0);
  return out;
}

double relative_error(const at::Tensor& weight, const at::Tensor& pruned, const at::Tensor& hessian) {
  const at::NoGradGuard no_grad;
  const auto statistics = checked_statistics("relative_error", "weight", weight, hessian, 2);
  TORCH_CHECK_VALUE(pruned.defined() && pruned.sizes() == weight.sizes(),
                    "[relative_error] both weights must have the same sizes, got ", weight.sizes(), " and ",
                    pruned.defined() ? pruned.sizes() : at::IntArrayRef());
  const int64_t groups = statistics.size(0);
  const auto dense = grouped_rows("relative_error", "weight", weight, groups, statistics.scalar_type());
  const auto change = dense - grouped_rows("relative_error", "pruned", pruned, groups, statistics.scalar_type());
  double lost = 0, all = 0;
  auto product = at::empty({dense.size(1), dense.size(2)}, dense.options());
  for (int64_t group = 0; group < groups; ++group) {
    for (const auto& [rows, sum] : {std::pair(change[group], &lost), {dense[group], &all}}) {
      linalg::add_product(product, rows, statistics[group], 0.0, 1.0);
      *sum += product.mul(rows).sum(at::kDouble).item<double>();
    }
  }
  return all > 0.0 ? std::max(lost, 0.0) / all : lost > 0.0 ? INFINITY : 0.0;
}

}  // namespace rarefy::pruning
