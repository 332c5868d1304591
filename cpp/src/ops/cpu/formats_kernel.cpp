#include <rarefy/ops/formats.h>
#include <torch/library.h>

#include <cmath>

#include "ops/cpu/blocks.h"
#include "ops/philox.h"

namespace rarefy::ops {
namespace {

/// Scales as the loops want them: contiguous, in the order of the blocks, their values checked.
template <typename T>
std::vector<T> scale_values(const char* function, const Arranged& a, const at::Tensor& scale) {
  const auto ordered = a.ordered(scale);
  std::vector<T> values(static_cast<size_t>(ordered.numel()));
  const auto fill = [&](const auto* given) {
    for (size_t i = 0; i < values.size(); ++i) {
      values[i] = static_cast<T>(given[i]);
      TORCH_CHECK_VALUE(std::isfinite(values[i]) && values[i] > 0, "[", function,
                        "] scale must be finite and positive, got ", given[i], " at index ", i);
    }
  };
  ordered.scalar_type() == at::kDouble ? fill(ordered.const_data_ptr<double>()) : fill(ordered.const_data_ptr<float>());
  return values;
}

template <typename T>
std::vector<T> zero_values(const char* function, const Arranged& a, const at::Tensor& zero_point, int64_t qmin,
                           int64_t qmax) {
  const auto ordered = a.ordered(zero_point);
  const auto* given = ordered.const_data_ptr<int32_t>();
  std::vector<T> values(static_cast<size_t>(ordered.numel()));
  for (size_t i = 0; i < values.size(); ++i) {
    TORCH_CHECK_VALUE(given[i] >= qmin && given[i] <= qmax, "[", function, "] zero_point must be within [", qmin, ", ",
                      qmax, "], got ", given[i], " at index ", i);
    values[i] = static_cast<T>(given[i]);
  }
  return values;
}

/// plain_loop for x of any type: what is no float64 is computed in float32.
template <typename Prepare>
void in_computing_type(const Arranged& a, const Prepare& prepare) {
  if (a.in.scalar_type() == at::kDouble) {
    plain_loop<double>(a, a.in, a.out, prepare(double{}));
    return;
  }
  const auto wide = a.in.to(at::kFloat);
  auto y = at::empty_like(wide);
  plain_loop<float>(a, wide, y, prepare(float{}));
  a.out.copy_(y);
}

struct Seed {
  uint64_t seed, call;
  explicit Seed(const at::Tensor& given) {
    const auto values = given.contiguous();
    seed = static_cast<uint64_t>(values.const_data_ptr<int64_t>()[0]);
    call = static_cast<uint64_t>(values.const_data_ptr<int64_t>()[1]);
  }
  template <typename T>
  T uniform(int64_t i) const {
    return static_cast<T>(uniform_at(seed, call, static_cast<uint64_t>(i)));
  }
};

/// A value in [low, high], NaN as it is.
template <typename T>
T clamped(T value, T low, T high) {
  return value < low ? low : value > high ? high : value;
}

at::Tensor fake_quantize_group_cpu(const at::Tensor& x, const at::Tensor& scale, const at::Tensor& zero_point,
                                   std::optional<int64_t> axis, c10::SymIntArrayRef block, int64_t qmin, int64_t qmax,
                                   bool /*clipped*/, const std::optional<at::Tensor>& seed) {
  constexpr auto function = "fake_quantize_group";
  const auto sharing = check_group(function, x, scale, zero_point, axis, block, qmin, qmax);
  check_seed(function, seed);
  auto a = arrange(x, sharing, /*write=*/true, /*logical=*/seed.has_value());
  if (seed.has_value() || x.scalar_type() == at::kDouble) {
    in_computing_type(a, [&](auto type) {
      using T = decltype(type);
      const auto low = static_cast<T>(qmin), high = static_cast<T>(qmax);
      return [=, s = scale_values<T>(function, a, scale), z = zero_values<T>(function, a, zero_point, qmin, qmax),
              random = seed.has_value() ? std::optional(Seed(*seed)) : std::nullopt](T value, size_t k, int64_t i) {
        const T y = value / s[k];
        const T rounded = random.has_value() ? std::floor(y + random->template uniform<T>(i)) : std::nearbyint(y);
        return (clamped(rounded + z[k], low, high) - z[k]) * s[k];
      };
    });
    return a.finish();
  }
  const auto s = scale_values<float>(function, a, scale), z = zero_values<float>(function, a, zero_point, qmin, qmax);
  const cpu::IntegerRange range{static_cast<float>(qmin), static_cast<float>(qmax)};
  const bool streaming = bypasses_caches(a.out);
  parallel_words(a.in.numel(), [&](int64_t begin, int64_t end) {
    RAREFY_ISA_CALL(grid_blocks, a.in.const_data_ptr(), a.out.data_ptr(), a.blocks, s.data(), z.data(), range,
                    streaming, begin, end);
  });
  return a.finish();
}

at::Tensor cast_minifloat_cpu(const at::Tensor& x, const at::Tensor& scale, std::optional<int64_t> axis,
                              c10::SymIntArrayRef block, int64_t exponent_bits, int64_t mantissa_bits, int64_t bias,
                              c10::string_view specials, bool saturate, bool /*clipped*/,
                              const std::optional<at::Tensor>& seed) {
  constexpr auto function = "cast_minifloat";
  const auto sharing = check_sharing(function, x, axis, block);
  check_scale(function, x, sharing, scale);
  check_seed(function, seed);
  const auto shape = minifloat_shape(function, exponent_bits, mantissa_bits, bias, specials, saturate);
  auto a = arrange(x, sharing, /*write=*/true, /*logical=*/seed.has_value());
  if (seed.has_value() || x.scalar_type() == at::kDouble) {
    in_computing_type(a, [&](auto type) {
      using T = decltype(type);
      return [=, s = scale_values<T>(function, a, scale),
              random = seed.has_value() ? std::optional(Seed(*seed)) : std::nullopt](T value, size_t k, int64_t i) {
        const T u = random.has_value() ? random->template uniform<T>(i) : T(0);
        return round_to_minifloat(value / s[k], shape, random.has_value() ? &u : nullptr) * s[k];
      };
    });
    return a.finish();
  }
  const auto s = scale_values<float>(function, a, scale);
  const auto element = shape.element();
  const bool streaming = bypasses_caches(a.out);
  parallel_words(a.in.numel(), [&](int64_t begin, int64_t end) {
    RAREFY_ISA_CALL(cast_blocks, a.in.const_data_ptr(), a.out.data_ptr(), a.blocks, s.data(), element, streaming, begin,
                    end);
  });
  return a.finish();
}

/// grad in x's arrangement and memory.
at::Tensor arranged_like(const Arranged& a, const at::Tensor& grad) {
  const auto moved = a.moved < 0 ? grad : grad.movedim(a.moved, -1);
  if (moved.strides() == a.in.strides()) {
    return moved;
  }
  return at::empty_like(a.in).copy_(moved);
}

at::Tensor fake_quantize_group_backward_cpu(const at::Tensor& grad, const at::Tensor& x, const at::Tensor& scale,
                                            const at::Tensor& zero_point, std::optional<int64_t> axis,
                                            c10::SymIntArrayRef block, int64_t qmin, int64_t qmax) {
  constexpr auto function = "fake_quantize_group_backward";
  const auto sharing = check_group(function, x, scale, zero_point, axis, block, qmin, qmax);
  check_same_input(function, grad, x);
  auto a = arrange(x, sharing);
  const auto g = arranged_like(a, grad);
  if (x.scalar_type() == at::kDouble) {
    const auto s = scale_values<double>(function, a, scale);
    const auto z = zero_values<double>(function, a, zero_point, qmin, qmax);
    const auto* upstream = g.const_data_ptr<double>();
    plain_loop<double>(a, a.in, a.out, [&](double value, size_t k, int64_t i) {
      const double q = std::nearbyint(value / s[k]) + z[k];
      return q >= static_cast<double>(qmin) && q <= static_cast<double>(qmax) ? upstream[i] : 0.0;
    });
    return a.finish();
  }
  const auto s = scale_values<float>(function, a, scale), z = zero_values<float>(function, a, zero_point, qmin, qmax);
  const cpu::IntegerRange range{static_cast<float>(qmin), static_cast<float>(qmax)};
  parallel_words(a.in.numel(), [&](int64_t begin, int64_t end) {
    RAREFY_ISA_CALL(clip_grid_blocks, g.const_data_ptr(), a.in.const_data_ptr(), a.out.data_ptr(), a.blocks, s.data(),
                    z.data(), range, begin, end);
  });
  return a.finish();
}

at::Tensor cast_minifloat_backward_cpu(const at::Tensor& grad, const at::Tensor& x, const at::Tensor& scale,
                                       std::optional<int64_t> axis, c10::SymIntArrayRef block, int64_t exponent_bits,
                                       int64_t mantissa_bits, int64_t bias, c10::string_view specials) {
  constexpr auto function = "cast_minifloat_backward";
  const auto sharing = check_sharing(function, x, axis, block);
  check_scale(function, x, sharing, scale);
  check_same_input(function, grad, x);
  const auto shape = minifloat_shape(function, exponent_bits, mantissa_bits, bias, specials, /*saturate=*/true);
  auto a = arrange(x, sharing);
  const auto g = arranged_like(a, grad);
  if (x.scalar_type() == at::kDouble) {
    const auto s = scale_values<double>(function, a, scale);
    const auto last = shape.last_inside<double>();
    const auto* upstream = g.const_data_ptr<double>();
    plain_loop<double>(a, a.in, a.out, [&](double value, size_t k, int64_t i) {
      return std::abs(value / s[k]) <= last ? upstream[i] : 0.0;
    });
    return a.finish();
  }
  const auto s = scale_values<float>(function, a, scale);
  const auto last = shape.last_inside<float>();
  parallel_words(a.in.numel(), [&](int64_t begin, int64_t end) {
    RAREFY_ISA_CALL(clip_blocks, g.const_data_ptr(), a.in.const_data_ptr(), a.out.data_ptr(), a.blocks, s.data(), -last,
                    last, begin, end);
  });
  return a.finish();
}

}  // namespace

TORCH_LIBRARY_IMPL(rarefy, CPU, m) {
  m.impl("fake_quantize_group", &fake_quantize_group_cpu);
  m.impl("cast_minifloat", &cast_minifloat_cpu);
  m.impl("fake_quantize_group_backward", &fake_quantize_group_backward_cpu);
  m.impl("cast_minifloat_backward", &cast_minifloat_backward_cpu);
}

}  // namespace rarefy::ops
