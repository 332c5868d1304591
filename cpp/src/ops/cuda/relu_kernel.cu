#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include "ops/cuda/relu_kernel.h"

namespace rarefy::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kMaxBlocks = 132 * 16;

__device__ bool is_positive(float x) { return !(x <= 0.0f); }
__device__ bool is_positive(double x) { return !(x <= 0.0); }
__device__ bool is_positive(__nv_bfloat16 x) { return is_positive(__bfloat162float(x)); }
__device__ bool is_positive(__half x) { return is_positive(__half2float(x)); }

template <typename T>
__global__ void relu_mask_kernel(const T* x, T* y, uint32_t* mask, int64_t elements) {
  const int64_t stride = static_cast<int64_t>(gridDim.x) * blockDim.x;
  // The grid's stride and the padded end are multiples of 32, so that whole warps reach the ballot.
  const int64_t padded = (elements + 63) / 64 * 64;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; i < padded; i += stride) {
    bool keep = false;
    if (i < elements) {
      const T value = x[i];
      keep = is_positive(value);
      y[i] = keep ? value : static_cast<T>(0.0f);
    }
    const unsigned bits = __ballot_sync(0xffffffffu, keep);
    if ((threadIdx.x & 31) == 0) {
      mask[i / 32] = bits;
    }
  }
}

template <typename T>
int launch(const void* x, void* y, void* mask, int64_t elements, void* stream) {
  const int64_t blocks = (elements + kThreads - 1) / kThreads;
  relu_mask_kernel<T>
      <<<static_cast<int>(blocks < kMaxBlocks ? blocks : kMaxBlocks), kThreads, 0, static_cast<cudaStream_t>(stream)>>>(
          static_cast<const T*>(x), static_cast<T*>(y), static_cast<uint32_t*>(mask), elements);
  return static_cast<int>(cudaGetLastError());
}

}  // namespace

int relu_mask(FloatType type, const void* x, void* y, void* mask, int64_t elements, void* stream) {
  if (elements == 0) {
    return 0;
  }
  switch (type) {
    case FloatType::f64:
      return launch<double>(x, y, mask, elements, stream);
    case FloatType::bf16:
      return launch<__nv_bfloat16>(x, y, mask, elements, stream);
    case FloatType::f16:
      return launch<__half>(x, y, mask, elements, stream);
    default:
      return launch<float>(x, y, mask, elements, stream);
  }
}

}  // namespace rarefy::cuda
