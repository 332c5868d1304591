#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/arange.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/isfinite.h>
#include <ATen/ops/ones.h>
#include <ATen/ops/zeros.h>
#include <c10/util/Exception.h>
#include <fmt/format.h>
#include <rarefy/pruning/calibrated.h>

#include <algorithm>
#include <limits>
#include <vector>

#include "linalg.h"
#include "ops/cpu/brain_surgery_simd.h"
#include "ops/mask_checks.h"
#include "pruning/calibrated_checks.h"
#include "pruning/smallest.h"

namespace rarefy::pruning {
namespace {

constexpr int64_t kPanel = 512;  // columns of blocks that are brought up to date together

/// How the columns of a weight are gone through.
struct Columns {
  at::Tensor order, back;          // undefined: as they are
  std::vector<int32_t> group_end;  // of N:M: where a column begins a group, the column behind it; else 0
  std::vector<int64_t> blocks;     // where blocks begin, and the end
};

/// N:M groups lie along the input channels of one place of the kernel, which have to be neighbours.
Columns columns_of(const at::Tensor& weight, const SparseGptOptions& options) {
  const int64_t features = weight.numel() / weight.size(0);
  const int64_t channels = weight.size(1), places = features / channels;
  Columns out;
  const auto* nm = std::get_if<NM>(&options.pattern);
  if (nm != nullptr) {
    out.group_end.assign(static_cast<size_t>(features), 0);
    for (int64_t place = 0; place < places; ++place) {
      for (int64_t channel = 0; channel < channels; channel += nm->m) {
        out.group_end[static_cast<size_t>(place * channels + channel)] =
            static_cast<int32_t>(place * channels + std::min(channel + nm->m, channels));
      }
    }
    if (places > 1) {
      const auto numbers = at::arange(features, at::TensorOptions(at::kLong));
      out.order = numbers.view({channels, places}).t().reshape({-1});
      out.back = numbers.view({places, channels}).t().reshape({-1});
    }
  }
  int64_t end = 0;
  while (end < features) {
    out.blocks.push_back(end);
    const int64_t begin = end;
    if (nm == nullptr) {
      end = std::min(begin + options.block, features);
      continue;
    }
    do {  // whole groups, at least one
      end = out.group_end[static_cast<size_t>(end)];
    } while (end < features && out.group_end[static_cast<size_t>(end)] - begin <= options.block);
  }
  out.blocks.push_back(features);
  return out;
}

struct Factor {
  at::Tensor upper;
  linalg::Damped damped;
};

Factor factor_of(const std::string& name, const at::Tensor& hessian, const SparseGptOptions& options) {
  const double mean = hessian.diagonal().mean().item<double>();
  Factor out;
  out.damped = linalg::with_damping(options.damping, options.max_damping, mean > 0.0 ? mean : 1.0, [&](double added) {
    auto damped = hessian.clone();
    damped.diagonal().add_(added);
    auto upper = linalg::inverse_factor(damped);
    if (!upper.has_value() || !at::isfinite(*upper).all().item<bool>()) {
      return false;
    }
    out.upper = std::move(*upper);
    return true;
  });
  TORCH_CHECK_VALUE(out.damped.ok, "[sparse_gpt] the Hessian of '", name,
                    "' must be positive definite with a damping of at most ", options.max_damping,
                    " of its mean diagonal");
  return out;
}

/// w [rows, features] becomes the pruned weights, keep their mask.
void prune(at::Tensor& w, const at::Tensor& upper, at::Tensor& keep, const Columns& columns, double sparsity,
           int64_t keep_of_group) {
  const int64_t rows = w.size(0), features = w.size(1);
  const bool has_groups = !columns.group_end.empty();
  auto errors = at::empty_like(w);
  // W of columns [to, to + width) -= what columns [from, to) owe to them.
  const auto settle = [&](int64_t from, int64_t to, int64_t width) {
    if (to > from && width > 0) {
      auto target = w.narrow(1, to, width);
      linalg::add_product(target, errors.narrow(1, from, to - from),
                          upper.narrow(0, from, to - from).narrow(1, to, width), 1.0, -1.0);
    }
  };
  int64_t pruned = 0, panel = 0, panel_end = 0;
  for (size_t b = 0; b + 1 < columns.blocks.size(); ++b) {
    const int64_t begin = columns.blocks[b], width = columns.blocks[b + 1] - begin;
    if (begin == panel_end) {  // the next blocks at once, from all earlier panels
      const auto next = std::find_if(columns.blocks.begin() + static_cast<int64_t>(b), columns.blocks.end() - 1,
                                     [&](int64_t end) { return end - begin >= kPanel; });
      panel = begin;
      panel_end = *next;
      settle(0, begin, panel_end - begin);
    }
    settle(panel, begin, width);
    const auto own = upper.narrow(0, begin, width).narrow(1, begin, width);
    const auto diagonal = own.diagonal().contiguous();
    const int64_t padded = (width + cpu::kSurgeryLanes - 1) / cpu::kSurgeryLanes * cpu::kSurgeryLanes;
    auto right = at::zeros({width, padded}, w.options());
    right.narrow(1, 0, width).copy_(own.triu(1));
    std::vector<int32_t> group_end;
    if (has_groups) {
      for (int64_t i = begin; i < begin + width; ++i) {
        const auto end = columns.group_end[static_cast<size_t>(i)];
        group_end.push_back(end == 0 ? 0 : end - static_cast<int32_t>(begin));
      }
    }
    const int64_t grain = std::max<int64_t>(1, 16384 / width);
    AT_DISPATCH_FLOATING_TYPES(w.scalar_type(), "sparse_gpt", [&] {
      auto* const values = w.mutable_data_ptr<scalar_t>() + begin;
      auto* const kept = static_cast<uint8_t*>(keep.mutable_data_ptr()) + begin;
      auto* const error = errors.mutable_data_ptr<scalar_t>() + begin;
      const cpu::SurgeryBlock<scalar_t> columns_here{right.const_data_ptr<scalar_t>(),
                                                     diagonal.const_data_ptr<scalar_t>(),
                                                     has_groups ? group_end.data() : nullptr,
                                                     keep_of_group,
                                                     width,
                                                     padded};
      if (!has_groups) {
        const int64_t target = ops::elements_to_prune(sparsity, rows * (begin + width));
        const int64_t here = std::min(target - pruned, rows * width);
        pruned += here;
        const auto costs = at::empty({rows, width}, w.options());
        auto* const cost = costs.template mutable_data_ptr<scalar_t>();
        at::parallel_for(0, rows, grain, [&](int64_t first, int64_t last) {
          RAREFY_ISA_CALL(surgery_costs, values + first * features, features, columns_here, last - first,
                          cost + first * width);
        });
        const auto choice = at::empty({rows, width}, keep.options());
        keep_all_but_smallest(cost, rows * width, here, static_cast<uint8_t*>(choice.mutable_data_ptr()));
        keep.narrow(1, begin, width).copy_(choice);
      }
      at::parallel_for(0, rows, grain, [&](int64_t first, int64_t last) {
        const auto scratch = at::empty({2 * padded}, w.options());
        RAREFY_ISA_CALL(surgery_rows, values + first * features, features, columns_here, kept + first * features,
                        features, error + first * features, features, last - first,
                        scratch.template mutable_data_ptr<scalar_t>());
      });
    });
  }
}

}  // namespace

void SparseGptOptions::validate() const {
  resolved_sparsity("sparse_gpt", sparsity, pattern);
  TORCH_CHECK_VALUE(block >= 1, "[sparse_gpt] block must be at least 1, got ", block);
  check_damping("sparse_gpt", damping, max_damping);
}

CalibratedWeight sparse_gpt(const std::string& name, const at::Tensor& weight, const at::Tensor& hessian,
                            const SparseGptOptions& options) {
  options.validate();
  const double sparsity = resolved_sparsity("sparse_gpt", options.sparsity, options.pattern);
  const at::NoGradGuard no_grad;
  const auto statistics = checked_statistics("sparse_gpt", name, weight, hessian, 2);
  const auto reason = misfit(options.pattern, weight.sizes());
  TORCH_CHECK_VALUE(reason.empty(), "[sparse_gpt] '", name, "': ", reason);
  auto rows = grouped_rows("sparse_gpt", name, weight, statistics.size(0), statistics.scalar_type());
  auto keep = at::empty(rows.sizes(), at::TensorOptions(at::kBool));
  const auto columns = columns_of(weight, options);
  const auto* nm = std::get_if<NM>(&options.pattern);
  CalibratedWeight out;
  for (int64_t group = 0; group < statistics.size(0); ++group) {
    auto h = statistics[group];
    auto w = rows[group];
    auto mask = keep[group];
    if (columns.order.defined()) {
      h = h.index_select(0, columns.order).index_select(1, columns.order);
      w = w.index_select(1, columns.order);
      mask = at::empty_like(mask);
    }
    const auto [upper, damped] = factor_of(name, h, options);
    out.damping = std::max(out.damping, damped.damping);
    // What meets zeros alone costs nothing: a divisor of infinity makes its cost and its error 0. When nothing but zeros
    // was seen, damping leaves the order of magnitudes.
    const auto dead = h.diagonal().eq(0);
    if (!dead.all().item<bool>()) {
      upper.diagonal().masked_fill_(dead, std::numeric_limits<double>::infinity());
    }
    prune(w, upper, mask, columns, sparsity, nm != nullptr ? nm->n : 0);
    if (columns.order.defined()) {
      rows[group].copy_(w.index_select(1, columns.back));
      keep[group].copy_(mask.index_select(1, columns.back));
    }
  }
  if (out.damping > options.damping) {
    out.note = fmt::format("damping raised to {:g}", out.damping);
  }
  out.weight = ungrouped(rows, weight);
  out.mask = keep.view(weight.sizes()).to(weight.device());
  return out;
}

}  // namespace rarefy::pruning
