#include "ops/cpu/fake_quantize_kernel.h"

#include <ATen/ops/empty_like.h>
#include <ATen/ops/empty_strided.h>
#include <rarefy/ops/fake_quantize.h>
#include <torch/library.h>

#include <atomic>
#include <cmath>
#include <cstring>

#include "ops/allocate.h"
#include "ops/cpu/dense.h"
#include "ops/cpu/grid.h"
#include "ops/fake_quantize_checks.h"

namespace rarefy::ops {
namespace {

/// The same formula in float64, plain: for gradient checks and reference runs, where speed is not the point.
void fake_quantize_double(const at::Tensor& x, const at::Tensor& out, uint8_t* mask, cpu::Layout layout,
                          const QuantizationGrid<double>& grid) {
  const double* in = x.const_data_ptr<double>();
  double* y = out.data_ptr<double>();
  parallel_words(x.numel(), [&](int64_t begin, int64_t end) {
    for (int64_t first = begin; first < end; first += kWord) {
      uint64_t word = 0;
      for (int64_t i = first; i < std::min(first + kWord, end); ++i) {
        const auto channel = static_cast<size_t>(i / layout.inner % layout.channels);
        const auto [clamped, q] = grid.index(in[i], channel);
        y[i] = (clamped - grid.zero_point[channel]) * grid.scale[channel];
        word |= static_cast<uint64_t>(q == clamped) << (i - first);
      }
      if (mask != nullptr) {
        std::memcpy(mask + first / 8, &word, sizeof word);
      }
    }
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

/// out = in where the mask's bit is 1, else 0; both dense with the strides of the mask's x. They may be one tensor.
void mask_gradient_into(const at::Tensor& in, const at::Tensor& mask, const at::Tensor& out) {
  const uint8_t* bits = mask.const_data_ptr<uint8_t>();
  if (in.const_data_ptr() == out.const_data_ptr() && is_all_ones(mask, in.numel())) {
    return;
  }
  if (in.scalar_type() == at::kDouble) {
    const double* g = in.const_data_ptr<double>();
    double* y = out.data_ptr<double>();
    parallel_words(in.numel(), [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        y[i] = (bits[i / 8] >> (i % 8) & 1) != 0 ? g[i] : 0.0;
      }
    });
    return;
  }
  const auto bytes = static_cast<int>(in.element_size());
  const void* g = in.const_data_ptr();
  void* y = out.data_ptr();
  const bool streaming = g != y && bypasses_caches(out);
  parallel_words(in.numel(), [&](int64_t begin, int64_t end) {
    RAREFY_ISA_CALL(mask_gradient, g, bits, y, bytes, streaming, begin, end);
  });
}

at::Tensor fake_quantize_backward_cpu(const at::Tensor& grad, const at::Tensor& mask, c10::SymIntArrayRef strides) {
  check_backward("fake_quantize_backward", grad, mask);
  const auto wanted = C10_AS_INTARRAYREF_SLOW(strides);
  check_dense_strides("fake_quantize_backward", grad.sizes(), wanted);
  if (grad.strides() == wanted) {
    auto out = empty_for(grad);
    mask_gradient_into(grad, mask, out);
    return out;
  }
  auto out = at::empty_strided(grad.sizes(), wanted, grad.options());
  out.copy_(grad);
  mask_gradient_into(out, mask, out);
  return out;
}

void fake_quantize_backward_inplace_cpu(at::Tensor& grad, const at::Tensor& mask) {
  check_backward("fake_quantize_backward_", grad, mask);
  check_dense_strides("fake_quantize_backward_", grad.sizes(), grad.strides());
  mask_gradient_into(grad, mask, grad);
}

at::Tensor quantize_cpu(const at::Tensor& x, const at::Tensor& scale, const at::Tensor& zero_point,
                        std::optional<int64_t> axis, int64_t qmin, int64_t qmax) {
  const int64_t resolved = check_fake_quantize("quantize", x, scale, zero_point, axis, qmin, qmax);
  check_quantized_type("quantize", qmin, qmax);
  const auto in = dense(x);
  auto out = at::empty_like(in, in.options().dtype(qmin < 0 ? at::kChar : at::kByte));
  auto* bytes = static_cast<uint8_t*>(out.data_ptr());
  if (in.scalar_type() == at::kDouble) {
    const QuantizationGrid<double> grid("quantize", scale, zero_point, qmin, qmax);
    const auto layout = layout_of(in, resolved);
    const double* values = in.const_data_ptr<double>();
    parallel_words(in.numel(), [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const double q = grid.index(values[i], static_cast<size_t>(i / layout.inner % layout.channels)).first;
        bytes[i] = static_cast<uint8_t>(std::isnan(q) ? qmax : static_cast<int64_t>(q));
      }
    });
    return out;
  }
  const VectorGrid grid("quantize", in, resolved, scale, zero_point, qmin, qmax);
  const void* values = in.const_data_ptr();
  parallel_words(in.numel(), [&](int64_t begin, int64_t end) {
    RAREFY_ISA_CALL(quantize, values, bytes, grid.layout(), grid.view(), begin, end);
  });
  return out;
}

}  // namespace

void fake_quantize_into(const char* function, const at::Tensor& x, const at::Tensor& out, uint8_t* mask,
                        const at::Tensor& scale, const at::Tensor& zero_point, int64_t axis, int64_t qmin,
                        int64_t qmax) {
  if (x.scalar_type() == at::kDouble) {
    fake_quantize_double(x, out, mask, layout_of(x, axis), {function, scale, zero_point, qmin, qmax});
    return;
  }
  const VectorGrid grid(function, x, axis, scale, zero_point, qmin, qmax);
  const void* in = x.const_data_ptr();
  void* y = out.data_ptr();
  const bool streaming = bypasses_caches(out);
  parallel_words(x.numel(), [&](int64_t begin, int64_t end) {
    RAREFY_ISA_CALL(fake_quantize, in, y, mask, grid.layout(), grid.view(), streaming, begin, end);
  });
}

bool is_all_ones(const at::Tensor& mask, int64_t elements) {
  const uint8_t* bits = mask.const_data_ptr<uint8_t>();
  const int64_t words = elements / kWord;
  std::atomic<bool> all{true};
  at::parallel_for(0, words, kGrain, [&](int64_t begin, int64_t end) {
    uint64_t together = ~uint64_t{0};
    for (int64_t i = begin; i < end; ++i) {
      uint64_t word = 0;
      std::memcpy(&word, bits + i * 8, sizeof word);
      together &= word;
    }
    if (together != ~uint64_t{0}) {
      all.store(false, std::memory_order_relaxed);
    }
  });
  for (int64_t i = words * kWord; i < elements; ++i) {
    all = all && (bits[i / 8] >> (i % 8) & 1) != 0;
  }
  return all;
}

at::Tensor empty_mask(const at::Tensor& x) { return empty_cached({mask_bytes(x.numel())}, at::kByte); }

TORCH_LIBRARY_IMPL(rarefy, CPU, m) {
  m.impl("fake_quantize", &fake_quantize_cpu);
  m.impl("fake_quantize_mask", &fake_quantize_mask_cpu);
  m.impl("fake_quantize_backward", &fake_quantize_backward_cpu);
  m.impl("fake_quantize_backward_", &fake_quantize_backward_inplace_cpu);
  m.impl("quantize", &quantize_cpu);
}

}  // namespace rarefy::ops
