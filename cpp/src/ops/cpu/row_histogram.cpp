#include "ops/cpu/row_histogram.h"

#include <algorithm>
#include <atomic>
#include <cmath>

#include "ops/cpu/dense.h"
#include "ops/cpu/histogram_simd.h"

namespace rarefy::ops {
namespace {

// Values that stay in a cache of the core between their range and their counts. The more, the fewer times bins move, which costs
// as much as counting some ten thousand values.
constexpr int64_t kTogether = int64_t{1} << 17;
constexpr int64_t kMostRecent = int64_t{1} << 30;

size_t bytes_of(cpu::FloatType type) { return type == cpu::FloatType::f32 ? 4 : 2; }

}  // namespace

void RowHistogram::flush() {
  if (recent_count_ == 0) {
    return;
  }
  for (size_t i = 0; i < counts_.size(); ++i) {
    const uint32_t* recent = recent_.data() + i * cpu::kCounters;
    counts_[i] += static_cast<int64_t>(recent[0]) + recent[1] + recent[2] + recent[3];
  }
  std::fill(recent_.begin(), recent_.end(), 0U);
  recent_count_ = 0;
}

void RowHistogram::release() {
  flush();
  std::vector<uint32_t>().swap(recent_);
}

void RowHistogram::widen(float low, float high) {
  low_ = std::min(low_, low);
  high_ = std::max(high_, high);
  const auto wider = layout_of_range(low_, high_, bins());
  if (wider != layout_) {
    flush();
    std::vector<int64_t> moved(counts_.size());
    add_rebinned(counts_.data(), layout_, moved.data(), wider, bins());
    counts_ = std::move(moved);
    layout_ = wider;
  }
}

bool RowHistogram::add(const void* x, cpu::FloatType type, int64_t n, int64_t runs, int64_t stride) {
  if (recent_.empty()) {
    recent_.resize(counts_.size() * cpu::kCounters);
  }
  const auto at = [&](int64_t run, int64_t i) {
    return static_cast<const char*>(x) + static_cast<size_t>(run * stride + i) * bytes_of(type);
  };
  // Whole runs, or parts of one.
  const int64_t size = std::min(n, kTogether), together = std::max<int64_t>(1, kTogether / n);
  for (int64_t run = 0; run < runs; run += together) {
    for (int64_t begin = 0; begin < n; begin += size) {
      if (!add_part(at(run, begin), type, std::min(size, n - begin), std::min(together, runs - run), stride)) {
        return false;
      }
    }
  }
  return true;
}

bool RowHistogram::add_part(const char* x, cpu::FloatType type, int64_t n, int64_t runs, int64_t stride) {
  const size_t step = static_cast<size_t>(stride) * bytes_of(type);
  float low = std::numeric_limits<float>::infinity(), high = -low;
  for (int64_t run = 0; run < runs; ++run) {
    const auto* from = x + static_cast<size_t>(run) * step;
    if (!RAREFY_ISA_CALL(min_max, from, cpu::Layout{type, 1, n}, &low, &high, 0, n)) {
      return false;
    }
  }
  if (low < low_ || high > high_) {
    widen(low + 0.0f, high + 0.0f);  // without -0
  }
  if (recent_count_ + runs * n > kMostRecent) {
    flush();
  }
  for (int64_t run = 0; run < runs; ++run) {
    const auto* from = x + static_cast<size_t>(run) * step;
    RAREFY_ISA_CALL(count, from, type, std::ldexp(1.0f, -layout_.exponent), static_cast<int32_t>(layout_.base),
                    recent_.data(), n);
  }
  recent_count_ += runs * n;
  return true;
}

void RowHistogram::add(const int64_t* counts, float low, float high) {
  if (low > high) {
    return;
  }
  flush();
  widen(low, high);
  add_rebinned(counts, layout_of_range(low, high, bins()), counts_.data(), layout_, bins());
}

void RowHistogram::add(RowHistogram& other) { add(other.counts().data(), other.low(), other.high()); }

at::Tensor value_rows(const at::Tensor& x, int64_t axis) {
  const auto values = x.scalar_type() == at::kDouble ? x.to(at::kFloat) : x;
  if (axis < 0 || values.size(axis) == 1) {
    const auto block = dense(values);
    return block.as_strided({1, block.numel()}, {block.numel(), 1});
  }
  return values.movedim(axis, 0).reshape({values.size(axis), -1}).contiguous();
}

/// The rows of x where each of them lies in long runs, as the channels of contiguous images do: [runs, rows, values].
std::optional<at::Tensor> runs_of_rows(const at::Tensor& x, int64_t axis) {
  constexpr int64_t kLongRun = 512;
  const auto values = x.scalar_type() == at::kDouble ? x.to(at::kFloat) : x;
  if (axis < 0 || values.size(axis) == 1 || !values.is_contiguous() || values.stride(axis) < kLongRun) {
    return std::nullopt;
  }
  return values.view({-1, values.size(axis), values.stride(axis)});
}

bool for_each_row_histogram(const at::Tensor& x, int64_t axis, int64_t bins,
                            const std::function<void(int64_t, RowHistogram&)>& use) {
  const auto runs = runs_of_rows(x, axis);
  const auto rows = runs.has_value() ? *runs : value_rows(x, axis).unsqueeze(0);
  const int64_t repeats = rows.size(0), count = rows.size(1), n = rows.size(2);
  const auto type = layout_of(rows, -1).type;
  const auto* values = static_cast<const char*>(rows.const_data_ptr());
  const auto at = [&](int64_t i) { return values + static_cast<size_t>(i) * bytes_of(type); };
  std::atomic<bool> finite{true};
  if (count == 1) {
    std::vector<RowHistogram> parts(static_cast<size_t>(at::get_num_threads()), RowHistogram(bins));
    parallel_words(n, [&](int64_t begin, int64_t end) {
      auto& part = parts[static_cast<size_t>(at::get_thread_num())];
      if (finite.load(std::memory_order_relaxed) && !part.add(at(begin), type, end - begin)) {
        finite.store(false, std::memory_order_relaxed);
      }
    });
    if (finite.load()) {
      RowHistogram all(bins);
      for (auto& part : parts) {
        all.add(part);
      }
      use(0, all);
    }
    return finite.load();
  }
  at::parallel_for(0, count, std::max<int64_t>(1, kGrain / (repeats * n)), [&](int64_t first, int64_t last) {
    for (int64_t row = first; row < last && finite.load(std::memory_order_relaxed); ++row) {
      RowHistogram histogram(bins);
      if (histogram.add(at(row * n), type, n, repeats, count * n)) {
        histogram.release();
        use(row, histogram);
      } else {
        finite.store(false, std::memory_order_relaxed);
      }
    }
  });
  return finite.load();
}

std::optional<std::vector<RowHistogram>> row_histograms(const at::Tensor& x, int64_t axis, int64_t bins) {
  const auto count = static_cast<size_t>(axis < 0 ? 1 : x.size(axis));
  std::vector<RowHistogram> result(count, RowHistogram(0));
  const bool finite = for_each_row_histogram(
      x, axis, bins, [&](int64_t row, RowHistogram& of_row) { result[static_cast<size_t>(row)] = std::move(of_row); });
  return finite ? std::optional(std::move(result)) : std::nullopt;
}

}  // namespace rarefy::ops
