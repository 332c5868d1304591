// The search for the best of many narrower ranges, whatever an error is measured on.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <vector>

#include "ops/cheapest.h"
#include "ops/power_of_two.h"

namespace rarefy {

/// The integers that a range is chosen for.
struct TargetGrid {
  int64_t qmin, qmax;
  bool symmetric, power_of_two;

  QParams parameters(ValueRange range) const { return range_to_qparams(range.low, range.high, qmin, qmax, symmetric); }
  /// The range itself, or the least one around it whose scale is a power of two.
  ValueRange allowed(ValueRange range) const {
    return power_of_two ? power_of_two_range(range, qmin, qmax, symmetric, /*nearest=*/false) : range;
  }
};

/// Keeps the cheapest range of those that it is shown; of equals, the first.
template <typename Cost>
class Narrowing {
 public:
  /// cost(QParams, limit) gives a double, as first_cheapest wants it. `whole` is the range of the values, widened to hold 0.
  Narrowing(ValueRange whole, const TargetGrid& grid, const Cost& cost) : whole_(whole), grid_(grid), cost_(cost) {
    best_ = whole_;
    best_.low = std::min(whole.low, 0.0f);
    best_.high = std::max(whole.high, 0.0f);
    whole_ = best_;
    best_ = grid_.allowed(whole_);
    last_ = grid_.parameters(best_);
    best_cost_ = cost_(last_, std::numeric_limits<double>::infinity());
  }

  ValueRange search(int64_t steps) {
    if (grid_.symmetric) {
      const float reach = std::max(-whole_.low, whole_.high);
      along(steps, [&](double factor) {
        const auto end = static_cast<float>(factor * static_cast<double>(reach));
        return ValueRange{std::max(whole_.low, -end), std::min(whole_.high, end)};
      });
      return best_;
    }
    const auto scaled = [](float end, double factor) { return static_cast<float>(factor * static_cast<double>(end)); };
    along(steps, [&](double factor) { return ValueRange{scaled(whole_.low, factor), scaled(whole_.high, factor)}; });
    if (whole_.low < 0.0f && whole_.high > 0.0f) {
      for (int round = 0; round < 2; ++round) {
        const double before = best_cost_;
        const ValueRange at = unsnapped_;
        along(steps, [&](double factor) { return ValueRange{at.low, scaled(whole_.high, factor)}; });
        const ValueRange now = unsnapped_;
        along(steps, [&](double factor) { return ValueRange{scaled(whole_.low, factor), now.high}; });
        if (best_cost_ == before) {
          break;
        }
      }
    }
    return best_;
  }

 private:
  struct Candidate {
    double factor;
    ValueRange wanted, allowed;
    QParams parameters;
  };

  /// range(factor) for factors from 1 down, then around the best of them.
  template <typename Range>
  void along(int64_t steps, const Range& range) {
    constexpr int kFiner = 5;
    if (unsnapped_.low == 0.0f && unsnapped_.high == 0.0f) {
      unsnapped_ = whole_;
    }
    factor_of_best_ = 0.0;
    for (int64_t i = steps; i >= 1; --i) {
      add(static_cast<double>(i) / static_cast<double>(steps), range);
    }
    show_all();
    if (factor_of_best_ > 0.0) {
      const double center = factor_of_best_, width = 1.0 / static_cast<double>(steps);
      for (int i = 1 - kFiner; i < kFiner; ++i) {
        const double factor = center + width * i / kFiner;
        if (i != 0 && factor > 0.0 && factor < 1.0) {
          add(factor, range);
        }
      }
      show_all();
    }
  }

  template <typename Range>
  void add(double factor, const Range& range) {
    const ValueRange wanted = range(factor);
    const ValueRange allowed = grid_.allowed(wanted);
    const QParams parameters = grid_.parameters(allowed);
    if (parameters.scale != last_.scale || parameters.zero_point != last_.zero_point) {
      last_ = parameters;
      candidates_.push_back({factor, wanted, allowed, parameters});
    }
  }

  void show_all() {
    const size_t winner = first_cheapest(candidates_.size(), &best_cost_, [&](size_t i, double limit) {
      return cost_(candidates_[i].parameters, limit);
    });
    if (winner < candidates_.size()) {
      best_ = candidates_[winner].allowed;
      unsnapped_ = candidates_[winner].wanted;
      factor_of_best_ = candidates_[winner].factor;
    }
    candidates_.clear();
  }

  ValueRange whole_, best_, unsnapped_{0.0f, 0.0f};
  const TargetGrid grid_;
  const Cost& cost_;
  QParams last_;
  double best_cost_, factor_of_best_ = 0.0;
  std::vector<Candidate> candidates_;
};

}  // namespace rarefy
