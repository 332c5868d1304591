#include "ops/cpu/cast_search.h"

#include <ATen/ops/empty.h>

#include <algorithm>

#include "ops/cheapest.h"
#include "ops/cpu/dense.h"
#include "ops/cpu/range_search_simd.h"

namespace rarefy::ops {

at::Tensor cheapest_casts(const at::Tensor& x, const at::Tensor& weights, const at::Tensor& scales,
                          const MinifloatShape& shape, at::Tensor& cost) {
  const int64_t n = x.size(1), candidates = scales.size(1);
  const auto values = x.contiguous(), given = scales.contiguous();
  const auto counted = weights.defined() ? weights.contiguous() : at::Tensor();
  const auto element = shape.element();
  auto winners = at::empty({x.size(0)}, x.options().dtype(at::kLong));
  const auto* all_values = values.const_data_ptr<float>();
  const auto* all_weights = counted.defined() ? counted.const_data_ptr<float>() : nullptr;
  const auto* all_scales = given.const_data_ptr<float>();
  auto* least = cost.data_ptr<double>();
  auto* out = winners.data_ptr<int64_t>();
  at::parallel_for(0, x.size(0), std::max<int64_t>(1, kGrain / (n * candidates)), [&](int64_t first, int64_t last) {
    for (int64_t row = first; row < last; ++row) {
      const auto* scale = all_scales + row * candidates;
      const auto winner = first_cheapest(static_cast<size_t>(candidates), &least[row], [&](size_t i, double limit) {
        return RAREFY_ISA_CALL(cast_error, all_values + row * n,
                               all_weights == nullptr ? nullptr : all_weights + row * n, n, scale[i], element, limit);
      });
      out[row] = winner < static_cast<size_t>(candidates) ? static_cast<int64_t>(winner) : -1;
    }
  });
  return winners;
}

}  // namespace rarefy::ops
