#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include "ops/cuda/mask_kernel.h"

namespace rarefy::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kMaxBlocks = 132 * 8;
constexpr int kBins = 2048;

__device__ int64_t key_of(float value) { return __float_as_uint(value) & 0x7fffffffu; }
__device__ int64_t key_of(__nv_bfloat16 value) {
  return static_cast<int64_t>(__bfloat16_as_ushort(value) & 0x7fffu) << 16;
}
__device__ int64_t key_of(__half value) { return key_of(__half2float(value)); }
__device__ int64_t key_of(double value) { return __double_as_longlong(value) & 0x7fffffffffffffffll; }

__device__ bool is_set(const uint8_t* mask, int64_t i) { return mask == nullptr || (mask[i / 8] >> (i % 8) & 1) != 0; }

template <typename T>
__global__ void count_keys_kernel(const T* x, const uint8_t* alive, int64_t elements, int64_t low, int64_t high,
                                  int shift, unsigned long long* histogram, unsigned long long* largest) {
  __shared__ unsigned bins[kBins];
  __shared__ unsigned long long block_largest;
  for (int bin = threadIdx.x; bin < kBins; bin += blockDim.x) {
    bins[bin] = 0;
  }
  if (threadIdx.x == 0) {
    block_largest = 0;
  }
  __syncthreads();
  unsigned long long mine = 0;
  const int64_t stride = static_cast<int64_t>(gridDim.x) * blockDim.x;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; i < elements; i += stride) {
    const int64_t key = key_of(x[i]);
    mine = max(mine, static_cast<unsigned long long>(key));
    if (key >= low && key <= high && is_set(alive, i)) {
      atomicAdd(bins + ((key - low) >> shift), 1u);
    }
  }
  atomicMax(&block_largest, mine);
  __syncthreads();
  for (int bin = threadIdx.x; bin < kBins; bin += blockDim.x) {
    if (bins[bin] != 0) {
      atomicAdd(histogram + bin, static_cast<unsigned long long>(bins[bin]));
    }
  }
  if (threadIdx.x == 0) {
    atomicMax(largest, block_largest);
  }
}

/// One block per chunk. Whole warps run to the padded end, so that every lane takes part in the ballots.
template <typename T>
__global__ void write_mask_kernel(const T* x, const uint8_t* alive, int64_t elements, int64_t threshold, uint32_t* mask,
                                  int32_t* ties) {
  __shared__ int block_ties;
  if (threadIdx.x == 0) {
    block_ties = 0;
  }
  __syncthreads();
  const int64_t begin = blockIdx.x * kChunk;
  const int64_t padded = (elements + 63) / 64 * 64;
  const int64_t end = begin + kChunk < padded ? begin + kChunk : padded;
  for (int64_t i = begin + threadIdx.x; i - (threadIdx.x & 31) < end; i += blockDim.x) {
    const bool present = i < elements && is_set(alive, i);
    const int64_t key = present ? key_of(x[i]) : -2;
    const unsigned kept = __ballot_sync(0xffffffffu, key > threshold);
    const unsigned tied = __ballot_sync(0xffffffffu, present && key == threshold);
    if ((threadIdx.x & 31) == 0) {
      mask[i / 32] = kept;
      if (tied != 0) {
        atomicAdd(&block_ties, __popc(tied));
      }
    }
  }
  __syncthreads();
  if (threadIdx.x == 0) {
    ties[blockIdx.x] = block_ties;
  }
}

/// One warp walks the chunk in order.
template <typename T>
__global__ void keep_ties_kernel(const T* x, const uint8_t* alive, int64_t elements, int64_t threshold, int64_t begin,
                                 int64_t prune_first, uint32_t* mask) {
  const int64_t padded = (elements + 63) / 64 * 64;
  const int64_t end = begin + kChunk < padded ? begin + kChunk : padded;
  const unsigned before = (1u << threadIdx.x) - 1u;
  int64_t seen = 0;
  for (int64_t i = begin + threadIdx.x; i - threadIdx.x < end; i += 32) {
    const bool present = i < elements && is_set(alive, i);
    const int64_t key = present ? key_of(x[i]) : -2;
    const bool tie = present && key == threshold;
    const unsigned tied = __ballot_sync(0xffffffffu, tie);
    const bool keep = present && (key > threshold || (tie && seen + __popc(tied & before) >= prune_first));
    const unsigned kept = __ballot_sync(0xffffffffu, keep);
    if (threadIdx.x == 0) {
      mask[i / 32] = kept;
    }
    seen += __popc(tied);
  }
}

template <typename T>
__global__ void apply_mask_kernel(T* x, const uint8_t* mask, int64_t elements) {
  const int64_t stride = static_cast<int64_t>(gridDim.x) * blockDim.x;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; i < elements; i += stride) {
    if (!is_set(mask, i)) {
      x[i] = static_cast<T>(0);
    }
  }
}

int blocks_for(int64_t elements) {
  const int64_t blocks = (elements + kThreads - 1) / kThreads;
  return static_cast<int>(blocks < kMaxBlocks ? blocks : kMaxBlocks);
}

cudaStream_t as_stream(void* stream) { return static_cast<cudaStream_t>(stream); }

/// Calls body(x as T*) with the type of the weights.
template <typename Body>
int for_weights(const Weights& weights, Body body) {
  if (weights.elements == 0) {
    return 0;
  }
  switch (weights.type) {
    case FloatType::f32:
      body(static_cast<const float*>(weights.x));
      break;
    case FloatType::f64:
      body(static_cast<const double*>(weights.x));
      break;
    case FloatType::bf16:
      body(static_cast<const __nv_bfloat16*>(weights.x));
      break;
    case FloatType::f16:
      body(static_cast<const __half*>(weights.x));
      break;
  }
  return static_cast<int>(cudaGetLastError());
}

}  // namespace

int count_keys(Weights weights, int64_t low, int64_t high, int shift, unsigned long long* histogram,
               unsigned long long* largest, void* stream) {
  return for_weights(weights, [&](auto* x) {
    count_keys_kernel<<<blocks_for(weights.elements), kThreads, 0, as_stream(stream)>>>(
        x, weights.alive, weights.elements, low, high, shift, histogram, largest);
  });
}

int write_mask(Weights weights, int64_t threshold, uint8_t* mask, int32_t* ties, void* stream) {
  return for_weights(weights, [&](auto* x) {
    const auto chunks = static_cast<unsigned>((weights.elements + kChunk - 1) / kChunk);
    write_mask_kernel<<<chunks, kThreads, 0, as_stream(stream)>>>(x, weights.alive, weights.elements, threshold,
                                                                  reinterpret_cast<uint32_t*>(mask), ties);
  });
}

int keep_ties(Weights weights, int64_t threshold, int64_t chunk, int64_t prune_first, uint8_t* mask, void* stream) {
  return for_weights(weights, [&](auto* x) {
    keep_ties_kernel<<<1, 32, 0, as_stream(stream)>>>(x, weights.alive, weights.elements, threshold, chunk * kChunk,
                                                      prune_first, reinterpret_cast<uint32_t*>(mask));
  });
}

int apply_mask(FloatType type, void* x, const uint8_t* mask, int64_t elements, void* stream) {
  if (elements == 0) {
    return 0;
  }
  // Zero is zero bits in every type: only the width matters.
  const auto launch = [&](auto* values) {
    apply_mask_kernel<<<blocks_for(elements), kThreads, 0, as_stream(stream)>>>(values, mask, elements);
  };
  if (type == FloatType::f64) {
    launch(static_cast<uint64_t*>(x));
  } else if (type == FloatType::f32) {
    launch(static_cast<uint32_t*>(x));
  } else {
    launch(static_cast<uint16_t*>(x));
  }
  return static_cast<int>(cudaGetLastError());
}

}  // namespace rarefy::cuda
