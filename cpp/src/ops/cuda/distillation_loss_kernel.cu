#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include "ops/cuda/distillation_loss_kernel.h"

namespace rarefy::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;
constexpr int64_t kMaxBlocks = 1 << 20;

__device__ float load(const float* p) { return *p; }
__device__ float load(const __nv_bfloat16* p) { return __bfloat162float(*p); }
__device__ float load(const __half* p) { return __half2float(*p); }
__device__ double load(const double* p) { return *p; }
__device__ void put(float* p, float value) { *p = value; }
__device__ void put(__nv_bfloat16* p, float value) { *p = __float2bfloat16_rn(value); }
__device__ void put(__half* p, float value) { *p = __float2half_rn(value); }
__device__ void put(double* p, double value) { *p = value; }

template <typename T>
using Compute = decltype(load(static_cast<const T*>(nullptr)));

__device__ float exponential(float x) { return expf(x); }
__device__ double exponential(double x) { return exp(x); }

struct Add {
  template <typename V>
  __device__ V operator()(V a, V b) const {
    return a + b;
  }
};
struct Max {  // passes over NaN, which shows in the sums
  template <typename V>
  __device__ V operator()(V a, V b) const {
    return b > a ? b : a;
  }
};

/// The values of all threads of the block combined in a fixed order; every thread gets the result.
template <typename V, typename Op>
__device__ V block_reduce(V value, Op op) {
  __shared__ V warps[kWarps];
  for (int offset = 16; offset > 0; offset /= 2) {
    value = op(value, __shfl_xor_sync(0xffffffffu, value, offset));
  }
  __syncthreads();  // `warps` may still be read from the last call
  if (threadIdx.x % 32 == 0) {
    warps[threadIdx.x / 32] = value;
  }
  __syncthreads();
  V result = warps[0];
  for (int warp = 1; warp < kWarps; ++warp) {
    result = op(result, warps[warp]);
  }
  return result;
}

__global__ void count_valid_kernel(const int64_t* labels, int64_t rows, int64_t ignore_index, int64_t* valid_rows) {
  long long count = 0;
  for (int64_t row = threadIdx.x; row < rows; row += kThreads) {
    count += labels == nullptr || labels[row] != ignore_index ? 1 : 0;
  }
  count = block_reduce(count, Add());
  if (threadIdx.x == 0) {
    *valid_rows = count;
  }
}

/// One block per row; the row is read three times, from cache after the first.
template <typename T>
__global__ void distill_rows_kernel(DistillationTask task) {
  using C = Compute<T>;
  const int64_t n = task.classes;
  const bool soft = task.alpha > 0.0, hard = task.alpha < 1.0;
  const C temperature = static_cast<C>(task.temperature);
  const double mean = task.deferred_mean ? 1.0 : 1.0 / static_cast<double>(*task.valid_rows);
  for (int64_t row = blockIdx.x; row < task.rows; row += gridDim.x) {
    const T* student = static_cast<const T*>(task.student) + row * n;
    const T* teacher = static_cast<const T*>(task.teacher) + row * n;
    T* grad = task.grad == nullptr ? nullptr : static_cast<T*>(task.grad) + row * n;
    const int64_t label = task.labels == nullptr ? 0 : task.labels[row];
    if (task.labels != nullptr && label == task.ignore_index) {
      for (int64_t i = threadIdx.x; grad != nullptr && i < n; i += kThreads) {
        put(grad + i, static_cast<C>(0));
      }
      if (threadIdx.x == 0) {
        task.row_losses[row] = 0.0;
      }
      continue;
    }
    C max_s = -static_cast<C>(INFINITY), max_t = max_s;
    for (int64_t i = threadIdx.x; i < n; i += kThreads) {
      max_s = Max()(max_s, load(student + i));
      if (soft) {
        max_t = Max()(max_t, load(teacher + i));
      }
    }
    max_s = block_reduce(max_s, Max());
    max_t = block_reduce(max_t, Max());

    C sum_s = 0, sum_t = 0, cross = 0, sum_hard = 0;
    for (int64_t i = threadIdx.x; i < n; i += kThreads) {
      const C s = load(student + i) - max_s;
      if (soft) {
        const C t = load(teacher + i) - max_t;
        const C e_t = exponential(t / temperature);
        sum_s += exponential(s / temperature);
        sum_t += e_t;
        // A class without teacher mass adds nothing, even where t - s is not a number.
        cross += e_t == static_cast<C>(0) ? static_cast<C>(0) : e_t * (t - s);
      }
      if (hard) {
        sum_hard += exponential(s);
      }
    }
    const double total_s = block_reduce(static_cast<double>(sum_s), Add());
    const double total_t = block_reduce(static_cast<double>(sum_t), Add());
    const double total_cross = block_reduce(static_cast<double>(cross), Add());
    const double total_hard = block_reduce(static_cast<double>(sum_hard), Add());
    const bool label_exists = label >= 0 && label < n;
    if (threadIdx.x == 0) {
      double loss = label_exists ? 0.0 : static_cast<double>(NAN);
      if (soft) {
        const double kl = total_cross / (task.temperature * total_t) - log(total_t) + log(total_s);
        loss += task.alpha * task.temperature * task.temperature * (kl < 0.0 ? 0.0 : kl);
      }
      if (hard && label_exists) {
        loss += (1.0 - task.alpha) *
                (static_cast<double>(max_s) + log(total_hard) - static_cast<double>(load(student + label)));
      }
      task.row_losses[row] = loss;
    }
    if (grad == nullptr) {
      continue;
    }
    const double soft_scale = task.alpha * task.temperature * mean;
    const C scale_s = static_cast<C>(soft_scale / total_s), scale_t = static_cast<C>(soft_scale / total_t);
    const C scale_hard = static_cast<C>((1.0 - task.alpha) * mean / total_hard);
    const C at_label = static_cast<C>((1.0 - task.alpha) * mean);
    for (int64_t i = threadIdx.x; i < n; i += kThreads) {
      const C s = load(student + i) - max_s;
      C g = 0;
      if (soft) {
        g = exponential(s / temperature) * scale_s - exponential((load(teacher + i) - max_t) / temperature) * scale_t;
      }
      if (hard) {
        g += exponential(s) * scale_hard - (i == label ? at_label : static_cast<C>(0));
      }
      put(grad + i, g);
    }
  }
}

template <typename Real>
__global__ void mean_kernel(DistillationTask task) {
  double sum = 0.0;
  for (int64_t row = threadIdx.x; row < task.rows; row += kThreads) {
    sum += task.row_losses[row];
  }
  sum = block_reduce(sum, Add());
  if (threadIdx.x == 0) {
    const auto valid = static_cast<double>(*task.valid_rows);
    *static_cast<Real*>(task.loss) = static_cast<Real>(sum / valid);
    if (task.scale != nullptr) {
      *static_cast<Real*>(task.scale) = static_cast<Real>(task.deferred_mean ? 1.0 / valid : 1.0);
    }
  }
}

template <typename T>
__global__ void scale_gradient_kernel(const T* grad, const Compute<T>* scale, const Compute<T>* upstream, T* out,
                                      int64_t elements) {
  const Compute<T> factor = static_cast<Compute<T>>(static_cast<double>(*scale) * static_cast<double>(*upstream));
  const int64_t stride = static_cast<int64_t>(gridDim.x) * blockDim.x;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; i < elements; i += stride) {
    put(out + i, load(grad + i) * factor);
  }
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

}  // namespace

int distillation_loss(const DistillationTask& task, void* stream) {
  const auto s = static_cast<cudaStream_t>(stream);
  count_valid_kernel<<<1, kThreads, 0, s>>>(task.labels, task.rows, task.ignore_index, task.valid_rows);
  return for_type(task.type, [&](auto tag) {
    using T = decltype(tag);
    const int blocks = static_cast<int>(task.rows < kMaxBlocks ? task.rows : kMaxBlocks);
    distill_rows_kernel<T><<<blocks, kThreads, 0, s>>>(task);
    if (task.type == FloatType::f64) {
      mean_kernel<double><<<1, kThreads, 0, s>>>(task);
    } else {
      mean_kernel<float><<<1, kThreads, 0, s>>>(task);
    }
  });
}

int scale_gradient(FloatType type, const void* grad, const void* scale, const void* upstream, void* out,
                   int64_t elements, void* stream) {
  if (elements == 0) {
    return 0;
  }
  return for_type(type, [&](auto tag) {
    using T = decltype(tag);
    const int64_t blocks = (elements + kThreads - 1) / kThreads;
    scale_gradient_kernel<T>
        <<<static_cast<int>(blocks < 132 * 16 ? blocks : 132 * 16), kThreads, 0, static_cast<cudaStream_t>(stream)>>>(
            static_cast<const T*>(grad), static_cast<const Compute<T>*>(scale),
            static_cast<const Compute<T>*>(upstream), static_cast<T*>(out), elements);
  });
}

}  // namespace rarefy::cuda
