#include "pruning/unit_mask.h"

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>
#include <rarefy/ops/mask.h>

#include <algorithm>
#include <cmath>
#include <numeric>

#include "ops/mask_checks.h"

#if !defined(INTRA_OP_PARALLEL)
#error "at::parallel_for is a template in torch's header: without -fopenmp here it runs on one thread, silently"
#endif

namespace rarefy::pruning {
namespace {

/// Units as blocks of a matrix, in the order of their first element's row, then column.
struct Grid {
  int64_t rows, columns;              // of the matrix
  int64_t block_rows, block_columns;  // of a unit; those at the end are smaller

  int64_t bands() const { return (rows + block_rows - 1) / block_rows; }
  int64_t stripes() const { return (columns + block_columns - 1) / block_columns; }
  int64_t units() const { return bands() * stripes(); }
  bool has_equal_units() const { return rows % block_rows == 0 && columns % block_columns == 0; }
};

struct MakeGrid {
  at::IntArrayRef sizes;
  int64_t rows = sizes.empty() ? 1 : sizes[0];
  int64_t columns = sizes.empty() ? 1 : c10::multiply_integers(sizes.slice(1));

  Grid blocks(int64_t block_rows, int64_t block_columns) const {
    return {rows, columns, std::max<int64_t>(1, block_rows), std::max<int64_t>(1, block_columns)};
  }
  Grid operator()(const Block& p) const { return blocks(p.rows, p.columns); }
  Grid operator()(const Row&) const { return blocks(1, columns); }
  Grid operator()(const Filter&) const { return blocks(1, columns); }
  Grid operator()(const Column&) const { return blocks(rows, c10::multiply_integers(sizes.slice(2))); }
  Grid operator()(const Head& p) const { return blocks(p.size, columns); }
  Grid operator()(const Unstructured&) const { TORCH_INTERNAL_ASSERT(false, "elements are no units"); }
  Grid operator()(const NM&) const { TORCH_INTERNAL_ASSERT(false, "elements are no units"); }
};

/// A candidate on the CPU, and its units.
struct Source {
  const Candidate* candidate;
  Grid grid;
  at::Tensor score;             // contiguous
  at::Tensor alive;             // bool, undefined: all
  std::vector<double> sums;     // of the scores of alive elements of each unit
  std::vector<int64_t> counts;  // alive elements of each unit
};

/// Sums over units, each in the order of its elements, in float64. Stripes of columns and bands of rows are shared among
/// threads; no unit is.
template <typename T>
void sum_units(Source& source, bool magnitude) {
  const Grid& grid = source.grid;
  const T* values = source.score.const_data_ptr<T>();
  const bool* alive = source.alive.defined() ? source.alive.const_data_ptr<bool>() : nullptr;
  constexpr int64_t kGrain = 16384;  // elements
  const int64_t stripes = grid.stripes();
  // With one tall band (columns), threads take stripes; else they take bands.
  const bool by_stripe = grid.bands() == 1;
  const int64_t per_part = by_stripe ? grid.rows * grid.block_columns : grid.block_rows * grid.columns;
  at::parallel_for(0, by_stripe ? stripes : grid.bands(), std::max<int64_t>(1, kGrain / std::max<int64_t>(1, per_part)),
                   [&](int64_t first, int64_t last) {
                     const int64_t row_begin = by_stripe ? 0 : first * grid.block_rows;
                     const int64_t row_end = by_stripe ? grid.rows : std::min(grid.rows, last * grid.block_rows);
                     const int64_t stripe_begin = by_stripe ? first : 0, stripe_end = by_stripe ? last : stripes;
                     for (int64_t row = row_begin; row < row_end; ++row) {
                       const int64_t unit_row = row / grid.block_rows * stripes;
                       for (int64_t stripe = stripe_begin; stripe < stripe_end; ++stripe) {
                         const auto unit = static_cast<size_t>(unit_row + stripe);
                         const int64_t begin = row * grid.columns + stripe * grid.block_columns;
                         const int64_t end =
                             row * grid.columns + std::min(grid.columns, (stripe + 1) * grid.block_columns);
                         double sum = source.sums[unit];
                         int64_t count = 0;
                         for (int64_t i = begin; i < end; ++i) {
                           if (alive == nullptr || alive[i]) {
                             const auto value = static_cast<double>(values[i]);
                             sum += magnitude ? std::fabs(value) : value;
                             ++count;
                           }
                         }
                         source.sums[unit] = sum;
                         source.counts[unit] += count;
                       }
                     }
                   });
}

Source make_source(const Candidate& candidate, const Pattern& pattern, bool regrow) {
  const bool magnitude = !candidate.score.defined();
  const auto& score = magnitude ? candidate.value : candidate.score;
  Source source{&candidate, std::visit(MakeGrid{candidate.value.sizes()}, pattern), score.cpu().contiguous(), {}, {},
                {}};
  if (candidate.mask.defined() && !regrow) {
    source.alive = ops::unpack_mask(candidate.mask.cpu(), score.sizes());
  }
  source.sums.assign(static_cast<size_t>(source.grid.units()), 0.0);
  source.counts.assign(source.sums.size(), 0);
  switch (score.scalar_type()) {
    case at::kDouble:
      sum_units<double>(source, magnitude);
      break;
    case at::kBFloat16:
      sum_units<c10::BFloat16>(source, magnitude);
      break;
    case at::kHalf:
      sum_units<c10::Half>(source, magnitude);
      break;
    default:
      sum_units<float>(source, magnitude);
  }
  for (const double sum : source.sums) {
    if (std::isnan(sum)) {
      const auto bad = source.score.isnan().flatten().nonzero();
      TORCH_CHECK_VALUE(bad.numel() == 0, "[choose_masks] ", magnitude ? "weights" : "scores", " must not be NaN, got ",
                        bad.size(0), " NaN in '", candidate.name, "', the first at flat index ",
                        bad[0].item<int64_t>());
      TORCH_CHECK_VALUE(false,
                        "[choose_masks] the scores of a unit must not hold infinities of both signs, got them in '",
                        candidate.name, "'");
    }
  }
  return source;
}

/// A unit that competes.
struct Unit {
  double score;
  int64_t elements;
  uint32_t source;
  uint32_t index;
};

/// How many of the ordered units go: as many as come nearest to `more` elements, of two equally near an even number of
/// all units that are pruned then.
size_t units_to_prune(const std::vector<Unit>& ordered, double more, int64_t already) {
  double pruned = 0.0;
  size_t count = 0;
  while (count < ordered.size()) {
    const double next = pruned + static_cast<double>(ordered[count].elements);
    const double without = more - pruned, with = next - more;
    const bool even = (already + static_cast<int64_t>(count)) % 2 == 0;
    if (without < with || (without == with && even)) {
      break;
    }
    pruned = next;
    ++count;
  }
  return count;
}

at::Tensor mask_of(const Source& source, const std::vector<char>& gone) {
  const Grid& grid = source.grid;
  auto kept = at::empty(source.score.sizes(), source.score.options().dtype(at::kBool).requires_grad(false));
  bool* out = kept.data_ptr<bool>();
  const bool* alive = source.alive.defined() ? source.alive.const_data_ptr<bool>() : nullptr;
  const int64_t stripes = grid.stripes();
  at::parallel_for(0, grid.rows, std::max<int64_t>(1, 16384 / std::max<int64_t>(1, grid.columns)),
                   [&](int64_t first, int64_t last) {
                     for (int64_t row = first; row < last; ++row) {
                       const int64_t unit_row = row / grid.block_rows * stripes;
                       for (int64_t stripe = 0; stripe < stripes; ++stripe) {
                         const bool stays = !gone[static_cast<size_t>(unit_row + stripe)];
                         const int64_t begin = stripe * grid.block_columns;
                         const int64_t end = std::min(grid.columns, begin + grid.block_columns);
                         for (int64_t i = row * grid.columns + begin; i < row * grid.columns + end; ++i) {
                           out[i] = stays && (alive == nullptr || alive[i]);
                         }
                       }
                     }
                   });
  return ops::pack_mask(kept).to(source.candidate->value.device());
}

}  // namespace

std::vector<at::Tensor> unit_masks(const std::vector<const Candidate*>& candidates, const Pattern& pattern,
                                   double sparsity, bool regrow) {
  std::vector<Source> sources;
  for (const auto* candidate : candidates) {
    sources.push_back(make_source(*candidate, pattern, regrow));
  }
  std::vector<Unit> units;
  int64_t total = 0, kept = 0, all_units = 0;
  bool are_equal = true;  // whole units of one size
  int64_t size = -1;
  for (size_t s = 0; s < sources.size(); ++s) {
    const auto& source = sources[s];
    const int64_t unit_size = source.grid.block_rows * source.grid.block_columns;
    are_equal = are_equal && source.grid.has_equal_units() && (size < 0 || size == unit_size);
    size = unit_size;
    total += source.score.numel();
    all_units += source.grid.units();
    for (size_t u = 0; u < source.sums.size(); ++u) {
      const int64_t count = source.counts[u];
      kept += count;
      if (count > 0) {
        are_equal = are_equal && count == unit_size;
        units.push_back(
            {source.sums[u] / static_cast<double>(count), count, static_cast<uint32_t>(s), static_cast<uint32_t>(u)});
      }
    }
  }
  const int64_t already = all_units - static_cast<int64_t>(units.size());
  // Of equal scores the earlier unit goes first, which makes the order total.
  const auto goes_before = [](const Unit& a, const Unit& b) {
    return a.score != b.score ? a.score < b.score : a.source != b.source ? a.source < b.source : a.index < b.index;
  };
  size_t count = 0;
  if (are_equal) {
    const int64_t more = std::max<int64_t>(0, ops::elements_to_prune(sparsity, all_units) - already);
    count = std::min(units.size(), static_cast<size_t>(more));
    std::nth_element(units.begin(), units.begin() + static_cast<std::ptrdiff_t>(count), units.end(), goes_before);
  } else {
    std::sort(units.begin(), units.end(), goes_before);
    const double wanted = sparsity * static_cast<double>(total) - static_cast<double>(total - kept);
    count = units_to_prune(units, wanted, already);
  }
  std::vector<std::vector<char>> gone;
  for (const auto& source : sources) {
    gone.emplace_back(source.sums.size(), 0);
  }
  for (size_t k = 0; k < count; ++k) {
    gone[units[k].source][units[k].index] = 1;
  }
  std::vector<at::Tensor> out;
  for (size_t s = 0; s < sources.size(); ++s) {
    out.push_back(mask_of(sources[s], gone[s]));
  }
  return out;
}

}  // namespace rarefy::pruning
