#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include "ops/cuda/fake_quantize_kernel.h"
#include "ops/qparams.h"

namespace rarefy::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kMaxBlocks = 132 * 16;

int blocks_for(int64_t elements) {
  const int64_t blocks = (elements + kThreads - 1) / kThreads;
  return static_cast<int>(blocks < kMaxBlocks ? blocks : kMaxBlocks);
}

__device__ float load(const float* p) { return *p; }
__device__ float load(const __nv_bfloat16* p) { return __bfloat162float(*p); }
__device__ float load(const __half* p) { return __half2float(*p); }
__device__ double load(const double* p) { return *p; }
__device__ void put(float* p, float value) { *p = value; }
__device__ void put(__nv_bfloat16* p, float value) { *p = __float2bfloat16_rn(value); }
__device__ void put(__half* p, float value) { *p = __float2half_rn(value); }
__device__ void put(double* p, double value) { *p = value; }

// IEEE division and no fused multiply-add, whatever the compiler's flags: the CPU's bits.
__device__ float divide(float a, float b) { return __fdiv_rn(a, b); }
__device__ double divide(double a, double b) { return __ddiv_rn(a, b); }
__device__ float multiply(float a, float b) { return __fmul_rn(a, b); }
__device__ double multiply(double a, double b) { return __dmul_rn(a, b); }
__device__ float nearest_even(float a) { return rintf(a); }
__device__ double nearest_even(double a) { return rint(a); }

template <typename T>
using Compute = decltype(load(static_cast<const T*>(nullptr)));

template <typename T, bool WithMask>
__global__ void fake_quantize_kernel(const T* x, T* y, uint32_t* mask, Layout layout, Grid grid) {
  using C = Compute<T>;
  const int64_t stride = static_cast<int64_t>(gridDim.x) * blockDim.x;
  // The grid's stride and the padded end are multiples of 32: the lanes of a warp take every step together, so that all of
  // them reach the ballot, and the last 64-bit word of the mask is written whole.
  const int64_t padded = (layout.elements + 63) / 64 * 64;
  const C* scales = static_cast<const C*>(grid.scale);
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; i < padded; i += stride) {
    bool inside = false;
    if (i < layout.elements) {
      const int64_t channel = layout.channels == 1 ? 0 : (i / layout.inner) % layout.channels;
      const C scale = scales[channel];
      const C zero_point = static_cast<C>(grid.zero_point[channel]);
      const C low = static_cast<C>(grid.qmin), high = static_cast<C>(grid.qmax);
      const C q = nearest_even(divide(load(x + i), scale)) + zero_point;
      const C clamped = q < low ? low : q > high ? high : q;
      put(y + i, multiply(clamped - zero_point, scale));
      inside = q >= low && q <= high;
    }
    if (WithMask) {
      const unsigned bits = __ballot_sync(0xffffffffu, inside);
      if ((threadIdx.x & 31) == 0) {
        mask[i / 32] = bits;
      }
    }
  }
}

// Moves bits and does no arithmetic: every value comes through as it is, NaN payloads too.
template <typename Word>
__global__ void mask_gradient_kernel(const Word* grad, const uint8_t* mask, Word* out, int64_t elements) {
  const int64_t stride = static_cast<int64_t>(gridDim.x) * blockDim.x;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; i < elements; i += stride) {
    out[i] = (mask[i / 8] >> (i % 8) & 1) != 0 ? grad[i] : Word{0};
  }
}

template <typename T>
__global__ void quantize_kernel(const T* x, uint8_t* y, Layout layout, Grid grid) {
  using C = Compute<T>;
  const int64_t stride = static_cast<int64_t>(gridDim.x) * blockDim.x;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; i < layout.elements; i += stride) {
    const int64_t channel = layout.channels == 1 ? 0 : (i / layout.inner) % layout.channels;
    const C q = nearest_even(divide(load(x + i), static_cast<const C*>(grid.scale)[channel])) +
                static_cast<C>(grid.zero_point[channel]);
    const C low = static_cast<C>(grid.qmin), high = static_cast<C>(grid.qmax);
    const C upper = q < high ? q : high;  // NaN gives qmax, as on the CPU
    y[i] = static_cast<uint8_t>(static_cast<int>(upper > low ? upper : low));
  }
}

// Unsigned integers that sort as the floats do, so that atomicMin and atomicMax work on them.
__device__ uint32_t encode(float value) {
  const uint32_t bits = __float_as_uint(value);
  return (bits & 0x80000000u) != 0 ? ~bits : bits | 0x80000000u;
}
__device__ float decode(uint32_t code) {
  return __uint_as_float((code & 0x80000000u) != 0 ? code & 0x7fffffffu : ~code);
}

__global__ void reset_kernel(uint32_t* encoded, int64_t channels) {
  const int64_t stride = static_cast<int64_t>(gridDim.x) * blockDim.x;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; i <= 2 * channels; i += stride) {
    encoded[i] = i < channels ? 0xffffffffu : 0u;  // beyond every float on either side; flag 0
  }
}

template <typename T>
__global__ void min_max_kernel(const T* x, uint32_t* encoded, Layout layout) {
  const int64_t stride = static_cast<int64_t>(gridDim.x) * blockDim.x;
  uint32_t low = 0xffffffffu, high = 0u;
  bool finite = true;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; i < layout.elements; i += stride) {
    const float value = static_cast<float>(load(x + i));
    finite = finite && isfinite(value);
    const uint32_t code = encode(value);
    if (layout.channels == 1) {
      low = code < low ? code : low;
      high = code > high ? code : high;
    } else {
      const int64_t channel = (i / layout.inner) % layout.channels;
      // Read first: most values do not move the range, and a plain read is far cheaper than an atomic.
      if (code < encoded[channel]) {
        atomicMin(encoded + channel, code);
      }
      if (code > encoded[layout.channels + channel]) {
        atomicMax(encoded + layout.channels + channel, code);
      }
    }
  }
  if (layout.channels == 1) {
    for (int offset = 16; offset > 0; offset /= 2) {
      const uint32_t other_low = __shfl_down_sync(0xffffffffu, low, offset);
      const uint32_t other_high = __shfl_down_sync(0xffffffffu, high, offset);
      low = other_low < low ? other_low : low;
      high = other_high > high ? other_high : high;
    }
    if ((threadIdx.x & 31) == 0) {
      atomicMin(encoded, low);
      atomicMax(encoded + 1, high);
    }
  }
  if (!finite) {
    encoded[2 * layout.channels] = 1u;
  }
}

__global__ void update_observer_kernel(const uint32_t* encoded, ObserverState state, int64_t channels, double constant,
                                       int64_t qmin, int64_t qmax, bool symmetric) {
  const int64_t c = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (c >= channels) {
    return;
  }
  float low = state.min_val[c], high = state.max_val[c];
  if (encoded[2 * channels] != 0u) {
    if (c == 0) {
      ++*state.skipped;
    }
    if (!(low <= high)) {
      const QParams parameters = range_to_qparams(0.0f, 0.0f, qmin, qmax, symmetric);
      state.scale[c] = parameters.scale;
      state.zero_point[c] = parameters.zero_point;
    }
    return;
  }
  // Adding 0 turns -0 into 0, as on the CPU.
  const float batch_low = decode(encoded[c]) + 0.0f, batch_high = decode(encoded[channels + c]) + 0.0f;
  if (!(low <= high)) {
    low = batch_low;
    high = batch_high;
  } else if (constant > 0.0) {
    low = moving_average(low, batch_low, constant);
    high = moving_average(high, batch_high, constant);
  } else {
    low = fminf(low, batch_low);
    high = fmaxf(high, batch_high);
  }
  const QParams parameters = range_to_qparams(low, high, qmin, qmax, symmetric);
  state.min_val[c] = low;
  state.max_val[c] = high;
  state.scale[c] = parameters.scale;
  state.zero_point[c] = parameters.zero_point;
}

template <typename Body>
int for_type(FloatType type, Body body) {
  switch (type) {
    case FloatType::f32:
      body(float());
      break;
    case FloatType::f64:
      body(double());
      break;
    case FloatType::bf16:
      body(__nv_bfloat16());
      break;
    case FloatType::f16:
      body(__half());
      break;
  }
  return static_cast<int>(cudaGetLastError());
}

cudaStream_t as_stream(void* stream) { return static_cast<cudaStream_t>(stream); }

}  // namespace

int fake_quantize(const void* x, void* y, void* mask, Layout layout, Grid grid, void* stream) {
  if (layout.elements == 0) {
    return 0;
  }
  return for_type(layout.type, [&](auto tag) {
    using T = decltype(tag);
    const auto* in = static_cast<const T*>(x);
    auto* out = static_cast<T*>(y);
    const int blocks = blocks_for(layout.elements);
    if (mask == nullptr) {
      fake_quantize_kernel<T, false><<<blocks, kThreads, 0, as_stream(stream)>>>(in, out, nullptr, layout, grid);
    } else {
      fake_quantize_kernel<T, true>
          <<<blocks, kThreads, 0, as_stream(stream)>>>(in, out, static_cast<uint32_t*>(mask), layout, grid);
    }
  });
}

template <typename Word>
int mask_gradient_words(const void* grad, const void* mask, void* out, int64_t elements, cudaStream_t stream) {
  mask_gradient_kernel<Word><<<blocks_for(elements), kThreads, 0, stream>>>(
      static_cast<const Word*>(grad), static_cast<const uint8_t*>(mask), static_cast<Word*>(out), elements);
  return static_cast<int>(cudaGetLastError());
}

int mask_gradient(const void* grad, const void* mask, void* out, Layout layout, void* stream) {
  if (layout.elements == 0) {
    return 0;
  }
  switch (layout.type) {
    case FloatType::f64:
      return mask_gradient_words<uint64_t>(grad, mask, out, layout.elements, as_stream(stream));
    case FloatType::f32:
      return mask_gradient_words<uint32_t>(grad, mask, out, layout.elements, as_stream(stream));
    default:
      return mask_gradient_words<uint16_t>(grad, mask, out, layout.elements, as_stream(stream));
  }
}

int quantize(const void* x, void* y, Layout layout, Grid grid, void* stream) {
  if (layout.elements == 0) {
    return 0;
  }
  return for_type(layout.type, [&](auto tag) {
    using T = decltype(tag);
    quantize_kernel<T><<<blocks_for(layout.elements), kThreads, 0, as_stream(stream)>>>(
        static_cast<const T*>(x), static_cast<uint8_t*>(y), layout, grid);
  });
}

int min_max(const void* x, uint32_t* encoded, Layout layout, void* stream) {
  reset_kernel<<<blocks_for(2 * layout.channels + 1), kThreads, 0, as_stream(stream)>>>(encoded, layout.channels);
  return for_type(layout.type, [&](auto tag) {
    using T = decltype(tag);
    min_max_kernel<T>
        <<<blocks_for(layout.elements), kThreads, 0, as_stream(stream)>>>(static_cast<const T*>(x), encoded, layout);
  });
}

int update_observer(const uint32_t* encoded, ObserverState state, int64_t channels, double constant, int64_t qmin,
                    int64_t qmax, bool symmetric, void* stream) {
  update_observer_kernel<<<static_cast<int>((channels + kThreads - 1) / kThreads), kThreads, 0, as_stream(stream)>>>(
      encoded, state, channels, constant, qmin, qmax, symmetric);
  return static_cast<int>(cudaGetLastError());
}

const char* error_string(int error) { return cudaGetErrorString(static_cast<cudaError_t>(error)); }

}  // namespace rarefy::cuda
