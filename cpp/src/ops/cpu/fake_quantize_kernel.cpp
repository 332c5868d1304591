#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/empty_strided.h>
#include <rarefy/ops/fake_quantize.h>
#include <torch/library.h>

#include <atomic>
#include <cmath>
#include <limits>

#include "ops/allocate.h"
#include "ops/cpu/fake_quantize_simd.h"
#include "ops/fake_quantize_checks.h"
#include "ops/qparams.h"

namespace rarefy::ops {
namespace {

constexpr int64_t kWord = 64;      // elements per word of the packed mask; ranges start on one
constexpr int64_t kGrain = 16384;  // elements below which a second thread does not pay

/// Runs body(begin, end) over [0, n) in parallel, every range starting on a whole word of the mask.
template <typename Body>
void parallel_words(int64_t n, const Body& body) {
  const int64_t words = (n + kWord - 1) / kWord;
  at::parallel_for(0, words, kGrain / kWord,
                   [&](int64_t first, int64_t last) { body(first * kWord, std::min(last * kWord, n)); });
}

cpu::FloatType float_type(const at::Tensor& x) {
  return x.scalar_type() == at::kBFloat16 ? cpu::FloatType::bf16
         : x.scalar_type() == at::kHalf   ? cpu::FloatType::f16
                                          : cpu::FloatType::f32;
}

/// x itself when its elements fill one block of memory, else a copy that does, in the same order of axes.
at::Tensor dense(const at::Tensor& x) { return x.is_non_overlapping_and_dense() ? x : x.clone(); }

cpu::Layout layout_of(const at::Tensor& x, int64_t axis) {
  const bool one_channel = axis < 0 || x.size(axis) == 1;
  return {float_type(x), one_channel ? 1 : x.size(axis), one_channel ? std::max<int64_t>(x.numel(), 1) : x.stride(axis)};
}

/// scale and zero_point as plain arrays, their values checked. T is the type that is computed in.
template <typename T>
struct QuantizationGrid {
  std::vector<T> scale;
  std::vector<T> zero_point;
  T qmin;
  T qmax;

  QuantizationGrid(const char* function, const at::Tensor& scales, const at::Tensor& zero_points, int64_t low,
                   int64_t high)
      : qmin(static_cast<T>(low)), qmax(static_cast<T>(high)) {
    const auto s = scales.to(at::kDouble).contiguous();
    const auto z = zero_points.contiguous();
    scale.reserve(static_cast<size_t>(s.numel()));
    zero_point.reserve(static_cast<size_t>(s.numel()));
    for (int64_t i = 0; i < s.numel(); ++i) {
      const double value = s.const_data_ptr<double>()[i];
      const int32_t zero = z.const_data_ptr<int32_t>()[i];
      TORCH_CHECK_VALUE(std::isfinite(value) && static_cast<T>(value) > 0, "[", function,
                        "] scale must be finite and positive, got ", value, " at index ", i);
      TORCH_CHECK_VALUE(zero >= low && zero <= high, "[", function, "] zero_point must be within [", low, ", ", high,
                        "], got ", zero, " at index ", i);
      scale.push_back(static_cast<T>(value));
      zero_point.push_back(static_cast<T>(zero));
    }
  }
};

cpu::Grid view(const QuantizationGrid<float>& grid) {
  return {grid.scale.data(), grid.zero_point.data(), grid.qmin, grid.qmax};
}

/// The same formula in float64, plain: for gradient checks and reference runs, where speed is not the point.
void fake_quantize_double(const at::Tensor& x, const at::Tensor& out, uint8_t* mask, cpu::Layout layout,
                          const QuantizationGrid<double>& grid) {
  const double* in = x.const_data_ptr<double>();
  double* y = out.data_ptr<double>();
  parallel_words(x.numel(), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const auto channel = static_cast<size_t>(i / layout.inner % layout.channels);
      const double q = std::nearbyint(in[i] / grid.scale[channel]) + grid.zero_point[channel];
      const double clamped = q < grid.qmin ? grid.qmin : q > grid.qmax ? grid.qmax : q;
      y[i] = (clamped - grid.zero_point[channel]) * grid.scale[channel];
      if (mask != nullptr) {
        const auto bit = static_cast<uint8_t>(1u << (i % 8));
        mask[i / 8] = static_cast<uint8_t>((i % 8 == 0 ? 0 : mask[i / 8]) | (q == clamped ? bit : 0));
      }
    }
  });
}

void fake_quantize_into(const char* function, const at::Tensor& x, const at::Tensor& out, uint8_t* mask,
                        const at::Tensor& scale, const at::Tensor& zero_point, int64_t axis, int64_t qmin,
                        int64_t qmax) {
  const auto layout = layout_of(x, axis);
  if (x.scalar_type() == at::kDouble) {
    fake_quantize_double(x, out, mask, layout, {function, scale, zero_point, qmin, qmax});
    return;
  }
  const QuantizationGrid<float> grid(function, scale, zero_point, qmin, qmax);
  const void* in = x.const_data_ptr();
  void* y = out.data_ptr();
  parallel_words(x.numel(), [&](int64_t begin, int64_t end) {
    RAREFY_ISA_CALL(fake_quantize, in, y, mask, layout, view(grid), begin, end);
  });
}

at::Tensor fake_quantize_cpu(const at::Tensor& x, const at::Tensor& scale, const at::Tensor& zero_point,
                             std::optional<int64_t> axis, int64_t qmin, int64_t qmax) {
  const int64_t resolved = check_fake_quantize("fake_quantize", x, scale, zero_point, axis, qmin, qmax);
  const auto in = dense(x);
  auto out = empty_for(in);
  fake_quantize_into("fake_quantize", in, out, nullptr, scale, zero_point, resolved, qmin, qmax);
  return out;
}

at::Tensor empty_mask(const at::Tensor& x) { return at::empty({mask_bytes(x.numel())}, x.options().dtype(at::kByte)); }

std::tuple<at::Tensor, at::Tensor> fake_quantize_mask_cpu(const at::Tensor& x, const at::Tensor& scale,
                                                          const at::Tensor& zero_point, std::optional<int64_t> axis,
                                                          int64_t qmin, int64_t qmax) {
  const int64_t resolved = check_fake_quantize("fake_quantize", x, scale, zero_point, axis, qmin, qmax);
  const auto in = dense(x);
  auto out = empty_for(in);
  auto mask = empty_mask(in);
  fake_quantize_into("fake_quantize", in, out, mask.data_ptr<uint8_t>(), scale, zero_point, resolved, qmin, qmax);
  return {out, mask};
}

at::Tensor fake_quantize_backward_cpu(const at::Tensor& grad, const at::Tensor& mask, c10::SymIntArrayRef strides) {
  check_float("fake_quantize_backward", grad, "grad");
  TORCH_CHECK_VALUE(mask.scalar_type() == at::kByte && mask.numel() == mask_bytes(grad.numel()),
                    "[fake_quantize_backward] mask must hold ", mask_bytes(grad.numel()), " bytes for ", grad.numel(),
                    " elements, got ", mask.numel(), " of ", mask.scalar_type());
  const auto wanted = C10_AS_INTARRAYREF_SLOW(strides);
  at::Tensor in = grad;
  at::Tensor out;
  if (grad.strides() == wanted && grad.is_non_overlapping_and_dense()) {
    out = empty_for(grad);
  } else {
    out = at::empty_strided(grad.sizes(), wanted, grad.options());
    out.copy_(grad);
    in = out;
  }
  const uint8_t* bits = mask.const_data_ptr<uint8_t>();
  if (grad.scalar_type() == at::kDouble) {
    const double* g = in.const_data_ptr<double>();
    double* y = out.data_ptr<double>();
    parallel_words(in.numel(), [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        y[i] = (bits[i / 8] >> (i % 8) & 1) != 0 ? g[i] : 0.0;
      }
    });
    return out;
  }
  const auto type = float_type(grad);
  const void* g = in.const_data_ptr();
  void* y = out.data_ptr();
  parallel_words(in.numel(), [&](int64_t begin, int64_t end) {
    RAREFY_ISA_CALL(mask_gradient, g, bits, y, type, begin, end);
  });
  return out;
}

at::Tensor quantize_cpu(const at::Tensor& x, const at::Tensor& scale, const at::Tensor& zero_point,
                        std::optional<int64_t> axis, int64_t qmin, int64_t qmax) {
  const int64_t resolved = check_fake_quantize("quantize", x, scale, zero_point, axis, qmin, qmax);
  check_quantized_type("quantize", qmin, qmax);
  auto in = dense(x);
  if (in.scalar_type() == at::kDouble) {
    in = in.to(at::kFloat);
  }
  auto out = at::empty_like(in, in.options().dtype(qmin < 0 ? at::kChar : at::kByte));
  const auto layout = layout_of(in, resolved);
  const QuantizationGrid<float> grid("quantize", scale, zero_point, qmin, qmax);
  const void* values = in.const_data_ptr();
  auto* bytes = static_cast<uint8_t*>(out.data_ptr());
  parallel_words(in.numel(), [&](int64_t begin, int64_t end) {
    RAREFY_ISA_CALL(quantize, values, bytes, layout, view(grid), begin, end);
  });
  return out;
}

struct Range {
  std::vector<float> low;
  std::vector<float> high;
};

[[noreturn]] void throw_not_finite(const char* function, const at::Tensor& x) {
  const auto flat = x.to(at::kDouble).contiguous();
  const double* values = flat.const_data_ptr<double>();
  int64_t nan = 0, infinite = 0, first = -1;
  for (int64_t i = 0; i < flat.numel(); ++i) {
    nan += std::isnan(values[i]) ? 1 : 0;
    infinite += std::isinf(values[i]) ? 1 : 0;
    first = first < 0 && !std::isfinite(values[i]) ? i : first;
  }
  // A finite float64 beyond float32's range is as good as infinite here: the statistics are float32.
  TORCH_CHECK_VALUE(false, "[", function, "] input must be finite (in float32), got ", nan, " NaN and ", infinite,
                    " infinite values of ", flat.numel(), ", the first at flat index ", first);
}

/// The range of each channel of a dense x. Throws when a value is not finite.
Range range_of(const char* function, const at::Tensor& x, int64_t axis) {
  if (x.scalar_type() == at::kDouble) {
    return range_of(function, x.to(at::kFloat), axis);
  }
  const auto layout = layout_of(x, axis);
  const auto channels = static_cast<size_t>(layout.channels);
  constexpr float infinity = std::numeric_limits<float>::infinity();
  const auto threads = static_cast<size_t>(at::get_num_threads());
  std::vector<Range> ranges(threads);
  std::atomic<bool> finite{true};
  const void* values = x.const_data_ptr();
  parallel_words(x.numel(), [&](int64_t begin, int64_t end) {
    auto& range = ranges[static_cast<size_t>(at::get_thread_num())];
    if (range.low.empty()) {
      range.low.assign(channels, infinity);
      range.high.assign(channels, -infinity);
    }
    if (!RAREFY_ISA_CALL(min_max, values, layout, range.low.data(), range.high.data(), begin, end)) {
      finite.store(false, std::memory_order_relaxed);
    }
  });
  if (!finite.load()) {
    throw_not_finite(function, x);
  }
  Range total{std::vector<float>(channels, infinity), std::vector<float>(channels, -infinity)};
  for (const auto& range : ranges) {
    for (size_t c = 0; c < range.low.size(); ++c) {
      total.low[c] = std::min(total.low[c], range.low[c]);
      total.high[c] = std::max(total.high[c], range.high[c]);
    }
  }
  return total;
}

/// Computes everything before it writes anything, so that an error leaves the state as it was.
void observe_into(const char* function, const at::Tensor& x, at::Tensor& min_val, at::Tensor& max_val,
                  at::Tensor& scale, at::Tensor& zero_point, int64_t axis, std::optional<double> averaging_constant,
                  int64_t qmin, int64_t qmax, bool symmetric) {
  for (const auto* state : {&min_val, &max_val, &scale, &zero_point}) {
    TORCH_CHECK_VALUE(state->is_contiguous(), "[", function, "] the observer's state must be contiguous");
  }
  const Range range = range_of(function, x, axis);
  float* low = min_val.data_ptr<float>();
  float* high = max_val.data_ptr<float>();
  float* scales = scale.data_ptr<float>();
  int32_t* zero_points = zero_point.data_ptr<int32_t>();
  const auto constant = static_cast<float>(averaging_constant.value_or(0.0));
  for (size_t c = 0; c < range.low.size(); ++c) {
    if (!(low[c] <= high[c])) {  // nothing observed yet
      low[c] = range.low[c];
      high[c] = range.high[c];
    } else if (averaging_constant.has_value()) {
      low[c] += constant * (range.low[c] - low[c]);
      high[c] += constant * (range.high[c] - high[c]);
    } else {
      low[c] = std::min(low[c], range.low[c]);
      high[c] = std::max(high[c], range.high[c]);
    }
    const QParams parameters = range_to_qparams(low[c], high[c], qmin, qmax, symmetric);
    scales[c] = parameters.scale;
    zero_points[c] = parameters.zero_point;
  }
}

void observe_cpu(const at::Tensor& x, at::Tensor& min_val, at::Tensor& max_val, at::Tensor& scale,
                 at::Tensor& zero_point, std::optional<int64_t> axis, std::optional<double> averaging_constant,
                 int64_t qmin, int64_t qmax, bool symmetric) {
  const int64_t resolved =
      check_observe("observe", x, min_val, max_val, scale, zero_point, axis, averaging_constant, qmin, qmax);
  observe_into("observe", dense(x), min_val, max_val, scale, zero_point, resolved, averaging_constant, qmin, qmax,
               symmetric);
}

at::Tensor observe_fake_quantize_cpu(const at::Tensor& x, at::Tensor& min_val, at::Tensor& max_val, at::Tensor& scale,
                                     at::Tensor& zero_point, std::optional<int64_t> axis,
                                     std::optional<double> averaging_constant, int64_t qmin, int64_t qmax,
                                     bool symmetric) {
  constexpr const char* function = "observe_fake_quantize";
  const int64_t resolved =
      check_observe(function, x, min_val, max_val, scale, zero_point, axis, averaging_constant, qmin, qmax);
  const auto in = dense(x);
  observe_into(function, in, min_val, max_val, scale, zero_point, resolved, averaging_constant, qmin, qmax, symmetric);
  auto out = empty_for(in);
  fake_quantize_into(function, in, out, nullptr, scale, zero_point, resolved, qmin, qmax);
  return out;
}

std::tuple<at::Tensor, at::Tensor> observe_fake_quantize_mask_cpu(
    const at::Tensor& x, at::Tensor& min_val, at::Tensor& max_val, at::Tensor& scale, at::Tensor& zero_point,
    std::optional<int64_t> axis, std::optional<double> averaging_constant, int64_t qmin, int64_t qmax, bool symmetric) {
  constexpr const char* function = "observe_fake_quantize";
  const int64_t resolved =
      check_observe(function, x, min_val, max_val, scale, zero_point, axis, averaging_constant, qmin, qmax);
  const auto in = dense(x);
  observe_into(function, in, min_val, max_val, scale, zero_point, resolved, averaging_constant, qmin, qmax, symmetric);
  auto out = empty_for(in);
  auto mask = empty_mask(in);
  fake_quantize_into(function, in, out, mask.data_ptr<uint8_t>(), scale, zero_point, resolved, qmin, qmax);
  return {out, mask};
}

std::tuple<at::Tensor, at::Tensor> choose_qparams_cpu(const at::Tensor& min_val, const at::Tensor& max_val, int64_t qmin,
                                                      int64_t qmax, bool symmetric) {
  check_range("choose_qparams", qmin, qmax);
  TORCH_CHECK_VALUE(min_val.sizes() == max_val.sizes(), "[choose_qparams] min_val and max_val must have one shape, got ",
                    min_val.sizes(), " and ", max_val.sizes());
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
  m.impl("fake_quantize", &fake_quantize_cpu);
  m.impl("fake_quantize_mask", &fake_quantize_mask_cpu);
  m.impl("fake_quantize_backward", &fake_quantize_backward_cpu);
  m.impl("quantize", &quantize_cpu);
  m.impl("observe", &observe_cpu);
  m.impl("observe_fake_quantize", &observe_fake_quantize_cpu);
  m.impl("observe_fake_quantize_mask", &observe_fake_quantize_mask_cpu);
  m.impl("choose_qparams", &choose_qparams_cpu);
}

}  // namespace rarefy::ops
