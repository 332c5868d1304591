#include <c10/util/Exception.h>
#include <rarefy/pruning/mask_choice.h>

#include <algorithm>
#include <cmath>
#include <numeric>

#include "ops/mask_checks.h"

namespace rarefy::pruning {

std::vector<int64_t> erk_counts(const std::vector<std::vector<int64_t>>& sizes, double sparsity) {
  TORCH_CHECK_VALUE(sparsity >= 0.0 && sparsity < 1.0, "[erk_counts] sparsity must be in [0, 1), got ", sparsity);
  const size_t layers = sizes.size();
  std::vector<double> elements(layers, 1.0), sums(layers, 0.0);
  std::vector<int64_t> count(layers, 1);
  int64_t total = 0;
  for (size_t i = 0; i < layers; ++i) {
    for (const auto size : sizes[i]) {
      count[i] *= size;
      sums[i] += static_cast<double>(size);
    }
    sums[i] = sizes[i].empty() ? 1.0 : sums[i];  // a single number is dense as a vector is: sum over product is 1
    elements[i] = static_cast<double>(count[i]);
    total += count[i];
  }
  const int64_t kept = total - ops::elements_to_prune(sparsity, total);

  // Density is epsilon * sum / elements, so a layer keeps epsilon * sum elements. Those of the largest density become
  // dense until no other would be more than that.
  std::vector<char> dense(layers, 0);
  double epsilon = 0.0;
  while (true) {
    double left = static_cast<double>(kept), sum = 0.0, largest = 0.0;
    for (size_t i = 0; i < layers; ++i) {
      if (count[i] == 0) {
        continue;
      }
      if (dense[i]) {
        left -= elements[i];
      } else {
        sum += sums[i];
        largest = std::max(largest, sums[i] / elements[i]);
      }
    }
    epsilon = sum > 0.0 ? std::max(left, 0.0) / sum : 0.0;
    if (epsilon * largest <= 1.0) {
      break;
    }
    for (size_t i = 0; i < layers; ++i) {
      dense[i] = dense[i] || (count[i] > 0 && sums[i] / elements[i] == largest);
    }
  }

  std::vector<int64_t> keeps(layers, 0);
  std::vector<std::pair<double, size_t>> remainders;
  int64_t left = kept;
  for (size_t i = 0; i < layers; ++i) {
    if (count[i] > 0) {
      const double exact = dense[i] ? elements[i] : std::min(epsilon * sums[i], elements[i]);
      keeps[i] = std::min(count[i], static_cast<int64_t>(std::floor(exact)));
      remainders.emplace_back(static_cast<double>(keeps[i]) - exact, i);
      left -= keeps[i];
    }
  }
  std::stable_sort(remainders.begin(), remainders.end(),
                   [](const auto& a, const auto& b) { return a.first < b.first; });
  // Once around is enough, except where rounding of epsilon left a few more: the numbers are exact all the same.
  while (left != 0) {
    const int64_t before = left;
    for (size_t k = 0; k < remainders.size() && left > 0; ++k) {
      auto& mine = keeps[remainders[k].second];
      if (mine < count[remainders[k].second]) {
        ++mine;
        --left;
      }
    }
    for (size_t k = remainders.size(); k-- > 0 && left < 0;) {
      auto& mine = keeps[remainders[k].second];
      if (mine > 0) {
        --mine;
        ++left;
      }
    }
    TORCH_INTERNAL_ASSERT(left != before, left, " elements have no place among ", total);
  }
  std::vector<int64_t> pruned(layers);
  for (size_t i = 0; i < layers; ++i) {
    pruned[i] = count[i] - keeps[i];
  }
  return pruned;
}

std::vector<double> erk_sparsities(const std::vector<std::vector<int64_t>>& sizes, double sparsity) {
  const auto pruned = erk_counts(sizes, sparsity);
  std::vector<double> out;
  for (size_t i = 0; i < sizes.size(); ++i) {
    const int64_t elements = std::accumulate(sizes[i].begin(), sizes[i].end(), int64_t{1}, std::multiplies<>());
    out.push_back(elements == 0 ? 0.0 : static_cast<double>(pruned[i]) / static_cast<double>(elements));
  }
  return out;
}

}  // namespace rarefy::pruning
