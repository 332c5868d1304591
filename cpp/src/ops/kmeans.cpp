#include "ops/kmeans.h"

#include <algorithm>
#include <cmath>
#include <limits>

namespace rarefy::ops {
namespace {

/// Sorted different values with the sums that give a cluster's mean and error at once.
class Line {
 public:
  explicit Line(std::vector<WeightedValue> points) {
    std::sort(points.begin(), points.end(), [](const auto& a, const auto& b) { return a.value < b.value; });
    for (const auto& point : points) {
      if (!values_.empty() && values_.back() == point.value) {
        weights_.back() += point.weight;
      } else {
        values_.push_back(point.value);
        weights_.push_back(point.weight);
      }
    }
    // Moments about the median: less cancellation.
    origin_ = values_[values_.size() / 2];
    sum0_.assign(1, 0.0);
    sum1_ = sum2_ = sum0_;
    for (size_t i = 0; i < values_.size(); ++i) {
      const double d = values_[i] - origin_;
      sum0_.push_back(sum0_.back() + weights_[i]);
      sum1_.push_back(sum1_.back() + weights_[i] * d);
      sum2_.push_back(sum2_.back() + weights_[i] * d * d);
    }
  }

  size_t size() const { return values_.size(); }
  double value(size_t i) const { return values_[i]; }
  double weight_before(size_t i) const { return sum0_[i]; }
  double total() const { return sum0_.back(); }
  /// The mean of values [first, last).
  double mean(size_t first, size_t last) const {
    return origin_ + (sum1_[last] - sum1_[first]) / (sum0_[last] - sum0_[first]);
  }
  /// Their squared distances from it.
  double error(size_t first, size_t last) const {
    const double weight = sum0_[last] - sum0_[first], first_moment = sum1_[last] - sum1_[first];
    return std::max(0.0, sum2_[last] - sum2_[first] - first_moment * first_moment / weight);
  }
  /// How many values are not above `bound`.
  size_t up_to(double bound) const {
    return static_cast<size_t>(std::upper_bound(values_.begin(), values_.end(), bound) - values_.begin());
  }

 private:
  std::vector<double> values_, weights_, sum0_, sum1_, sum2_;
  double origin_ = 0.0;
};

/// The least error of the first `last` values in k clusters, for all of them, from that in k - 1; the best beginnings of the
/// last cluster rise with `last`, which divides the work (Wu, 1991).
void add_cluster(const Line& line, const std::vector<double>& before, std::vector<double>& best,
                 std::vector<uint32_t>& begins, size_t low, size_t high, size_t from, size_t to) {
  if (low > high) {
    return;
  }
  const size_t middle = (low + high) / 2;
  best[middle] = std::numeric_limits<double>::infinity();
  for (size_t begin = from; begin <= std::min(middle - 1, to); ++begin) {
    const double error = before[begin] + line.error(begin, middle);
    if (error < best[middle]) {
      best[middle] = error;
      begins[middle] = static_cast<uint32_t>(begin);
    }
  }
  const size_t split = begins[middle];
  if (middle > low) {
    add_cluster(line, before, best, begins, low, middle - 1, from, split);
  }
  add_cluster(line, before, best, begins, middle + 1, high, split, to);
}

std::vector<double> optimal(const Line& line, size_t clusters) {
  const size_t n = line.size();
  std::vector<double> before(n + 1, std::numeric_limits<double>::infinity()), best(before);
  before[0] = 0.0;
  for (size_t last = 1; last <= n; ++last) {
    before[last] = line.error(0, last);
  }
  std::vector<std::vector<uint32_t>> begins(clusters, std::vector<uint32_t>(n + 1, 0));
  for (size_t k = 1; k < clusters; ++k) {
    std::fill(best.begin(), best.end(), std::numeric_limits<double>::infinity());
    add_cluster(line, before, best, begins[k], k + 1, n, k, n - 1);
    std::swap(before, best);
  }
  std::vector<double> centers(clusters);
  size_t last = n;
  for (size_t k = clusters; k-- > 0;) {
    const size_t begin = k == 0 ? 0 : begins[k][last];
    centers[k] = line.mean(begin, last);
    last = begin;
  }
  return centers;
}

std::vector<double> lloyd(const Line& line, size_t clusters, int64_t iterations) {
  std::vector<double> centers;
  for (size_t k = 0, i = 0; k < clusters; ++k) {
    const double wanted = line.total() * (static_cast<double>(k) + 0.5) / static_cast<double>(clusters);
    while (i + 1 < line.size() && line.weight_before(i + 1) < wanted) {
      ++i;
    }
    centers.push_back(line.value(i));
  }
  for (int64_t round = 0; round < iterations; ++round) {
    auto next = centers;
    size_t begin = 0;
    for (size_t k = 0; k < clusters; ++k) {
      const size_t end = k + 1 == clusters ? line.size() : line.up_to((centers[k] + centers[k + 1]) / 2.0);
      if (end > begin) {
        next[k] = line.mean(begin, end);
        begin = end;
      }
    }
    std::sort(next.begin(), next.end());
    if (next == centers) {
      break;
    }
    centers = std::move(next);
  }
  return centers;
}

}  // namespace

std::vector<double> kmeans(std::vector<WeightedValue> points, int64_t entries, int64_t iterations) {
  constexpr size_t kExact = size_t{1} << 22;
  const Line line(std::move(points));
  const auto clusters = std::min(static_cast<size_t>(entries), line.size());
  auto centers = line.size() * clusters <= kExact ? optimal(line, clusters) : lloyd(line, clusters, iterations);
  centers.resize(static_cast<size_t>(entries), centers.back());
  return centers;
}

}  // namespace rarefy::ops
