#include "ops/cpu/divergence_search.h"

#include <algorithm>
#include <cmath>
#include <limits>

namespace rarefy::ops {
namespace {

double x_log_x(int64_t count) {
  const auto x = static_cast<double>(count);
  return count == 0 ? 0.0 : x * std::log(x);
}

}  // namespace

ClipDivergence::ClipDivergence(const std::vector<int64_t>& counts)
    : counts_(counts), before_(counts.size() + 1), filled_(counts.size() + 1), entropy_(counts.size() + 1) {
  for (size_t i = 0; i < counts.size(); ++i) {
    before_[i + 1] = before_[i] + counts[i];
    filled_[i + 1] = filled_[i] + (counts[i] != 0 ? 1 : 0);
    entropy_[i + 1] = entropy_[i] + x_log_x(counts[i]);
  }
}

double ClipDivergence::operator()(int64_t first, int64_t last, int64_t levels) const {
  const auto at = [](const auto& sums, int64_t i) { return sums[static_cast<size_t>(i)]; };
  const int64_t total = before_.back(), width = last - first;
  const int64_t below = at(before_, first), above = total - at(before_, last);
  const int64_t inside = total - below - above;
  constexpr double infinity = std::numeric_limits<double>::infinity();
  if (inside == 0 || (below != 0 && at(counts_, first) == 0) || (above != 0 && at(counts_, last - 1) == 0)) {
    return infinity;  // p > 0 = q in an end bin
  }
  // sum p log p, of which the clipped counts change the end bins alone.
  double p_log_p = at(entropy_, last) - at(entropy_, first);
  if (width == 1) {
    p_log_p = x_log_x(total);
  } else {
    const int64_t low = at(counts_, first), high = at(counts_, last - 1);
    p_log_p += x_log_x(low + below) - x_log_x(low) + x_log_x(high + above) - x_log_x(high);
  }
  double p_log_q = 0.0;
  for (int64_t level = 0, begin = first; level < levels && begin < last; ++level) {
    const int64_t end = std::min(first + ((level + 1) * width + levels - 1) / levels, last);
    const int64_t sum = at(before_, end) - at(before_, begin);
    if (sum != 0) {
      const int64_t clipped = sum + (begin == first ? below : 0) + (end == last ? above : 0);
      const int64_t filled = at(filled_, end) - at(filled_, begin);
      p_log_q += static_cast<double>(clipped) * std::log(static_cast<double>(sum) / static_cast<double>(filled));
    }
    begin = end;
  }
  const auto n = static_cast<double>(total);
  return (p_log_p - p_log_q) / n - std::log(n) + std::log(static_cast<double>(inside));
}

std::pair<int64_t, int64_t> ClipDivergence::search(int64_t zero, int64_t levels) const {
  int64_t first = 0, last = size();
  if (last <= levels) {
    return {first, last};
  }
  double best = (*this)(first, last, levels);
  const auto show = [&](int64_t from, int64_t to) {
    const double divergence = (*this)(from, to, levels);
    // A difference that rounding makes is none: the wider range came first.
    if (divergence < best - 1e-12) {
      best = divergence;
      first = from;
      last = to;
    }
  };
  const bool moves_first = zero > 0, moves_last = zero < size();
  for (int round = 0; round < (moves_first && moves_last ? 2 : 1); ++round) {
    const double before = best;
    if (moves_last) {
      const int64_t from = first;
      for (int64_t to = size() - 1; to >= std::max(from + levels, zero + 1); --to) {
        show(from, to);
      }
    }
    if (moves_first) {
      const int64_t to = last;
      for (int64_t from = 1; from <= std::min(to - levels, zero - 1); ++from) {
        show(from, to);
      }
    }
    if (best == before) {
      break;
    }
  }
  return {first, last};
}

}  // namespace rarefy::ops
