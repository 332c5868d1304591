#include <ATen/ops/empty.h>
#include <rarefy/ops/fake_quantize.h>
#include <torch/library.h>

#include <atomic>
#include <cmath>
#include <limits>
#include <optional>
#include <vector>

#include "ops/allocate.h"
#include "ops/cpu/dense.h"
#include "ops/cpu/fake_quantize_kernel.h"
#include "ops/fake_quantize_checks.h"
#include "ops/qparams.h"

namespace rarefy::ops {
namespace {

struct Range {
  std::vector<float> low;
  std::vector<float> high;

  explicit Range(size_t channels)
      : low(channels, std::numeric_limits<float>::infinity()),
        high(channels, -std::numeric_limits<float>::infinity()) {}
};

/// The range of each channel of a dense x; unset when a value is not finite. A finite float64 beyond float32's range is
/// infinite here: the statistics are float32.
std::optional<Range> range_of(const at::Tensor& x, int64_t axis) {
  if (x.scalar_type() == at::kDouble) {
    return range_of(x.to(at::kFloat), axis);
  }
  const auto layout = layout_of(x, axis);
  const auto wide = spread(layout, x.numel());
  std::vector<Range> ranges(static_cast<size_t>(at::get_num_threads()), Range(0));
  std::atomic<bool> finite{true};
  const void* values = x.const_data_ptr();
  parallel_words(x.numel(), [&](int64_t begin, int64_t end) {
    auto& range = ranges[static_cast<size_t>(at::get_thread_num())];
    if (range.low.empty()) {
      range = Range(static_cast<size_t>(wide.channels));
    }
    if (!RAREFY_ISA_CALL(min_max, values, wide, range.low.data(), range.high.data(), begin, end)) {
      finite.store(false, std::memory_order_relaxed);
    }
  });
  if (!finite.load()) {
    return std::nullopt;
  }
  Range total(static_cast<size_t>(layout.channels));
  const bool is_wide = wide.channels != layout.channels;
  for (const auto& range : ranges) {
    for (size_t i = 0; i < range.low.size(); ++i) {
      const size_t c = is_wide ? i / static_cast<size_t>(layout.inner) % total.low.size() : i;
      // Adding 0 turns -0 into 0, whose place among the zeros depends on the order of comparing.
      total.low[c] = std::min(total.low[c], range.low[i]) + 0.0f;
      total.high[c] = std::max(total.high[c], range.high[i]) + 0.0f;
    }
  }
  return total;
}

bool is_unset(float low, float high) {
  constexpr float infinity = std::numeric_limits<float>::infinity();
  return low == infinity && high == -infinity;
}

/// Computes and checks everything before it writes anything, so that an error leaves the state as it was.
void observe_into(const char* function, const at::Tensor& x, at::Tensor& min_val, at::Tensor& max_val,
                  at::Tensor& scale, at::Tensor& zero_point, at::Tensor& skipped, int64_t axis,
                  std::optional<double> averaging_constant, int64_t qmin, int64_t qmax, bool symmetric) {
  const auto range = range_of(x, axis);
  float* low = min_val.data_ptr<float>();
  float* high = max_val.data_ptr<float>();
  const auto channels = static_cast<size_t>(min_val.numel());
  for (size_t c = 0; c < channels; ++c) {
    TORCH_CHECK_VALUE(
        is_unset(low[c], high[c]) || (std::isfinite(low[c]) && std::isfinite(high[c]) && low[c] <= high[c]), "[",
        function, "] min_val and max_val must be a finite range or (inf, -inf) for none, got (", low[c], ", ", high[c],
        ") at index ", c);
  }
  float* scales = scale.data_ptr<float>();
  int32_t* zero_points = zero_point.data_ptr<int32_t>();
  const auto derive = [&](size_t c, float from, float to) {
    const QParams parameters = range_to_qparams(from, to, qmin, qmax, symmetric);
    scales[c] = parameters.scale;
    zero_points[c] = parameters.zero_point;
  };
  if (!range.has_value()) {
    ++*skipped.data_ptr<int64_t>();
  }
  for (size_t c = 0; c < channels; ++c) {
    const bool unset = is_unset(low[c], high[c]);
    if (!range.has_value()) {
      if (unset) {  // a grid to round this batch to
        derive(c, 0.0f, 0.0f);
      }
      continue;
    }
    if (unset) {
      low[c] = range->low[c];
      high[c] = range->high[c];
    } else if (averaging_constant.has_value()) {
      low[c] = moving_average(low[c], range->low[c], *averaging_constant);
      high[c] = moving_average(high[c], range->high[c], *averaging_constant);
    } else {
      low[c] = std::min(low[c], range->low[c]);
      high[c] = std::max(high[c], range->high[c]);
    }
    derive(c, low[c], high[c]);
  }
}

void observe_cpu(const at::Tensor& x, at::Tensor& min_val, at::Tensor& max_val, at::Tensor& scale,
                 at::Tensor& zero_point, at::Tensor& skipped, std::optional<int64_t> axis,
                 std::optional<double> averaging_constant, int64_t qmin, int64_t qmax, bool symmetric) {
  const int64_t resolved = check_observe("observe", x, min_val, max_val, scale, zero_point, skipped, axis,
                                         averaging_constant, qmin, qmax, symmetric);
  observe_into("observe", dense(x), min_val, max_val, scale, zero_point, skipped, resolved, averaging_constant, qmin,
               qmax, symmetric);
}

/// Memory is taken before the state changes: running out of it is an error that leaves the state as it was.
at::Tensor observe_fake_quantize_cpu(const at::Tensor& x, at::Tensor& min_val, at::Tensor& max_val, at::Tensor& scale,
                                     at::Tensor& zero_point, at::Tensor& skipped, std::optional<int64_t> axis,
                                     std::optional<double> averaging_constant, int64_t qmin, int64_t qmax,
                                     bool symmetric) {
  constexpr const char* function = "observe_fake_quantize";
  const int64_t resolved = check_observe(function, x, min_val, max_val, scale, zero_point, skipped, axis,
                                         averaging_constant, qmin, qmax, symmetric);
  const auto in = dense(x);
  auto out = empty_for(in);
  observe_into(function, in, min_val, max_val, scale, zero_point, skipped, resolved, averaging_constant, qmin, qmax,
               symmetric);
  fake_quantize_into(function, in, out, nullptr, scale, zero_point, resolved, qmin, qmax);
  return out;
}

std::tuple<at::Tensor, at::Tensor> observe_fake_quantize_mask_cpu(const at::Tensor& x, at::Tensor& min_val,
                                                                  at::Tensor& max_val, at::Tensor& scale,
                                                                  at::Tensor& zero_point, at::Tensor& skipped,
                                                                  std::optional<int64_t> axis,
                                                                  std::optional<double> averaging_constant,
                                                                  int64_t qmin, int64_t qmax, bool symmetric) {
  constexpr const char* function = "observe_fake_quantize";
  const int64_t resolved = check_observe(function, x, min_val, max_val, scale, zero_point, skipped, axis,
                                         averaging_constant, qmin, qmax, symmetric);
  const auto in = dense(x);
  auto out = empty_for(in);
  auto mask = empty_mask(in);
  observe_into(function, in, min_val, max_val, scale, zero_point, skipped, resolved, averaging_constant, qmin, qmax,
               symmetric);
  fake_quantize_into(function, in, out, mask.data_ptr<uint8_t>(), scale, zero_point, resolved, qmin, qmax);
  return {out, mask};
}

std::tuple<at::Tensor, at::Tensor> choose_qparams_cpu(const at::Tensor& min_val, const at::Tensor& max_val,
                                                      int64_t qmin, int64_t qmax, bool symmetric) {
  check_choose_qparams("choose_qparams", min_val, max_val, qmin, qmax, symmetric);
  const auto low = min_val.to(at::kFloat).contiguous();
  const auto high = max_val.to(at::kFloat).contiguous();
  auto scale = at::empty(low.sizes(), low.options());
  auto zero_point = at::empty(low.sizes(), low.options().dtype(at::kInt));
  for (int64_t i = 0; i < low.numel(); ++i) {
    const float a = low.const_data_ptr<float>()[i];
    const float b = high.const_data_ptr<float>()[i];
    TORCH_CHECK_VALUE(std::isfinite(a) && std::isfinite(b) && a <= b,
                      "[choose_qparams] the range must be finite with min <= max, got [", a, ", ", b, "] at index ", i);
    const QParams parameters = range_to_qparams(a, b, qmin, qmax, symmetric);
    scale.data_ptr<float>()[i] = parameters.scale;
    zero_point.data_ptr<int32_t>()[i] = parameters.zero_point;
  }
  return {scale, zero_point};
}

}  // namespace

TORCH_LIBRARY_IMPL(rarefy, CPU, m) {
  m.impl("observe", &observe_cpu);
  m.impl("observe_fake_quantize", &observe_fake_quantize_cpu);
  m.impl("observe_fake_quantize_mask", &observe_fake_quantize_mask_cpu);
  m.impl("choose_qparams", &choose_qparams_cpu);
}

}  // namespace rarefy::ops
