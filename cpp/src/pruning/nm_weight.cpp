#include "pruning/nm_weight.h"

#include <algorithm>
#include <functional>
#include <numeric>

namespace rarefy::pruning {

NMWeight::NMWeight(const at::Tensor& weight, const NM& pattern)
    : pattern_(pattern), places_(weight.size(1)), lines_(weight.numel() / std::max<int64_t>(1, weight.size(1))) {
  const auto columns = weight.detach().movedim(1, 0).abs().to(at::kCPU, at::kFloat).contiguous();
  const float* data = columns.const_data_ptr<float>();
  magnitudes_.assign(data, data + columns.numel());
  at_.resize(static_cast<size_t>(places_));
  std::iota(at_.begin(), at_.end(), int64_t{0});
}

double NMWeight::kept(int64_t stripe) const {
  const int64_t begin = stripe * pattern_.m, end = std::min(places_, begin + pattern_.m), size = end - begin;
  double sum = 0.0;
  if (size == 4 && pattern_.n == 2) {
    const float *a = column(begin), *b = column(begin + 1), *c = column(begin + 2), *d = column(begin + 3);
    for (int64_t i = 0; i < lines_; ++i) {
      const float high = std::max(a[i], b[i]), low = std::min(a[i], b[i]);
      const float other_high = std::max(c[i], d[i]), other_low = std::min(c[i], d[i]);
      const float first = std::max(high, other_high);
      const float second = std::max(std::min(high, other_high), std::max(low, other_low));
      sum += static_cast<double>(first) + static_cast<double>(second);
    }
    return sum;
  }
  std::vector<float> values(static_cast<size_t>(size));
  for (int64_t i = 0; i < lines_; ++i) {
    for (int64_t p = 0; p < size; ++p) {
      values[static_cast<size_t>(p)] = column(begin + p)[i];
    }
    const int64_t n = std::min(size, pattern_.n);
    std::partial_sort(values.begin(), values.begin() + n, values.end(), std::greater<>());
    for (int64_t p = 0; p < n; ++p) {
      sum += static_cast<double>(values[static_cast<size_t>(p)]);
    }
  }
  return sum;
}

double NMWeight::kept() const {
  double sum = 0.0;
  for (int64_t stripe = 0; stripe * pattern_.m < places_; ++stripe) {
    sum += kept(stripe);
  }
  return sum;
}

double NMWeight::total() const {
  double sum = 0.0;
  for (const float magnitude : magnitudes_) {
    sum += static_cast<double>(magnitude);
  }
  return sum;
}

}  // namespace rarefy::pruning
