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
__device__ float logarithm(float x) { return logf(x); }
__device__ double logarithm(double x) { return log(x); }
__device__ float logarithm_1p(float x) { return log1pf(x); }
__device__ double logarithm_1p(double x) { return log1p(x); }

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

/// NaN for what a weight must not be; 0 where the row is not valid.
__device__ double weight_of(const DistillationTask& task, int64_t row) {
  const double weight = task.row_weights == nullptr ? 1.0 : task.row_weights[row];
  if (weight == 0.0 || (task.labels != nullptr && task.labels[row] == task.ignore_index)) {
    return 0.0;
  }
  return weight > 0.0 && weight <= 1.7976931348623157e308 ? weight : static_cast<double>(NAN);
}

__global__ void total_weight_kernel(DistillationTask task) {
  double total = 0.0, largest = 0.0;
  for (int64_t row = threadIdx.x; row < task.rows; row += kThreads) {
    const double weight = weight_of(task, row);
    total += weight;
    largest = Max()(largest, weight);
  }
  total = block_reduce(total, Add());
  largest = block_reduce(largest, Max());
  if (threadIdx.x == 0) {
    task.total_weight[0] = total;
    task.total_weight[1] = largest;
  }
}

/// What one class adds to a divergence, and its derivative in q up to a constant that is the same for all classes.
template <typename C>
struct Term {
  C value;
  C slope;
};

/// log(e^a + e^b), where at least one of them is above -inf.
template <typename C>
__device__ C log_add_exp(C a, C b) {
  const C high = a > b ? a : b, low = a > b ? b : a;
  return high + logarithm_1p(exponential(low - high));
}

/// x beside a mixture m of it.
template <typename C>
struct Ratio {
  C log;     // log(x / m)
  C excess;  // x / m - 1
};

/// From x / m - 1 formed by differences where that is near 0, so that x == m gives exactly 0. Elsewhere it has lost what makes
/// x small beside m, and the logarithms have not.
template <typename C>
__device__ Ratio<C> ratio(C excess, C log_x, C log_m) {
  const C half = static_cast<C>(0.5), difference = log_x - log_m;
  return excess > -half && excess < half ? Ratio<C>{logarithm_1p(excess), excess}
                                         : Ratio<C>{difference, exponential(difference) - static_cast<C>(1)};
}

/// x * log(x / m), where x = 0 counts as 0 whatever the logarithm is.
template <typename C>
__device__ C weighted(C x, const Ratio<C>& of) {
  return x == static_cast<C>(0) ? x : x * of.log;
}

/// The divergences but kl, whose gradient has a simpler form. p == q gives exactly 0 for both members.
template <typename C>
__device__ Term<C> term(Divergence divergence, C skew, C log_p, C log_q) {
  const C p = exponential(log_p), q = exponential(log_q), zero = 0, rest = static_cast<C>(1) - skew;
  if (divergence == Divergence::reverse_kl) {
    return q == zero ? Term<C>{zero, zero} : Term<C>{q * (log_q - log_p), log_q - log_p};
  }
  if (divergence == Divergence::total_variation) {
    const C half = static_cast<C>(0.5), d = p - q;
    return {half * (d < zero ? -d : d), q > p ? half : q < p ? -half : d};  // d: 0 or NaN
  }
  if (p == zero && q == zero) {
    return {zero, zero};
  }
  // The mixture m is written so that p == q gives m == q exactly.
  const C log_skew = logarithm(skew), log_rest = logarithm_1p(-skew);
  if (divergence == Divergence::skewed_reverse_kl) {
    const C m = p + skew * (q - p);
    const Ratio<C> of_q = ratio(rest * (q - p) / m, log_q, log_add_exp(log_skew + log_q, log_rest + log_p));
    return {weighted(q, of_q), q == zero ? zero : of_q.log - skew * of_q.excess};
  }
  const C m = q + skew * (p - q), log_m = log_add_exp(log_skew + log_p, log_rest + log_q);
  const Ratio<C> of_p = ratio(rest * (p - q) / m, log_p, log_m);
  if (divergence == Divergence::skewed_kl) {
    return {weighted(p, of_p), -rest * of_p.excess};
  }
  const Ratio<C> of_q = ratio(skew * (q - p) / m, log_q, log_m);
  return {skew * weighted(p, of_p) + rest * weighted(q, of_q), q == zero ? zero : rest * of_q.log};
}

/// One block per row; the row is read three or four times, from cache after the first.
template <typename T>
__global__ void distill_rows_kernel(DistillationTask task) {
  using C = Compute<T>;
  const int64_t n = task.classes;
  const bool soft = task.alpha > 0.0, hard = task.alpha < 1.0;
  const C temperature = static_cast<C>(task.temperature);
  const bool kl = task.divergence == Divergence::kl;
  const C skew = static_cast<C>(task.skew);
  const double mean = task.reduction == Reduction::mean ? 1.0 / task.total_weight[task.deferred_mean ? 1 : 0] : 1.0;
  for (int64_t row = blockIdx.x; row < task.rows; row += gridDim.x) {
    const T* student = static_cast<const T*>(task.student) + row * n;
    const T* teacher = static_cast<const T*>(task.teacher) + row * n;
    T* grad = task.grad == nullptr ? nullptr : static_cast<T*>(task.grad) + row * n;
    const int64_t label = task.labels == nullptr ? 0 : task.labels[row];
    const bool label_exists = label >= 0 && label < n;
    double weight = weight_of(task, row);
    if (weight == 0.0) {
      for (int64_t i = threadIdx.x; grad != nullptr && i < n; i += kThreads) {
        put(grad + i, static_cast<C>(0));
      }
      if (threadIdx.x == 0) {
        task.row_losses[row] = 0.0;
      }
      continue;
    }
    if (!label_exists) {
      weight = static_cast<double>(NAN);  // in the loss and in the gradient
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

    C sum_s = 0, sum_t = 0, cross = 0, sum_hard = 0, sum_logits = 0;
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
        sum_logits += s;
      }
    }
    const double total_s = block_reduce(static_cast<double>(sum_s), Add());
    const double total_t = block_reduce(static_cast<double>(sum_t), Add());
    const double total_cross = block_reduce(static_cast<double>(cross), Add());
    const double total_hard = block_reduce(static_cast<double>(sum_hard), Add());
    const double total_logits = block_reduce(static_cast<double>(sum_logits), Add());
    const C log_s = static_cast<C>(log(total_s)), log_t = static_cast<C>(log(total_t));
    double divergence = total_cross / (task.temperature * total_t) - log(total_t) + log(total_s), mean_slope = 0.0;
    if (soft && !kl) {
      double value = 0.0, slope = 0.0;
      for (int64_t i = threadIdx.x; i < n; i += kThreads) {
        const C log_q = (load(student + i) - max_s) / temperature - log_s;
        const C log_p = (load(teacher + i) - max_t) / temperature - log_t;
        const Term<C> at = term(task.divergence, skew, log_p, log_q);
        const C q = exponential(log_q);
        value += static_cast<double>(at.value);
        slope += q == static_cast<C>(0) ? 0.0 : static_cast<double>(q * at.slope);
      }
      divergence = block_reduce(value, Add());
      mean_slope = block_reduce(slope, Add());
    }
    if (threadIdx.x == 0) {
      double loss = 0.0;
      if (soft) {
        loss += task.alpha * task.temperature * task.temperature * (divergence < 0.0 ? 0.0 : divergence);
      }
      if (hard && label_exists) {
        const double log_hard = log(total_hard), at_label = static_cast<double>(load(student + label) - max_s);
        double cross_entropy = (1.0 - task.label_smoothing) * (log_hard - at_label);
        if (task.label_smoothing > 0.0) {
          cross_entropy += task.label_smoothing * (log_hard - total_logits / static_cast<double>(n));
        }
        loss += (1.0 - task.alpha) * cross_entropy;
      }
      task.row_losses[row] = weight * loss;
    }
    if (grad == nullptr) {
      continue;
    }
    const double soft_scale = weight * task.alpha * task.temperature * mean;
    const double hard_scale = weight * (1.0 - task.alpha) * mean;
    const C scale_s = static_cast<C>(soft_scale / total_s), scale_t = static_cast<C>(soft_scale / total_t);
    const C scale_hard = static_cast<C>(hard_scale / total_hard), centre = static_cast<C>(mean_slope);
    const C at_label = static_cast<C>(hard_scale * (1.0 - task.label_smoothing));
    const C spread = static_cast<C>(hard_scale * task.label_smoothing / static_cast<double>(n));
    for (int64_t i = threadIdx.x; i < n; i += kThreads) {
      const C s = load(student + i) - max_s;
      C g = 0;
      if (soft && kl) {
        g = exponential(s / temperature) * scale_s - exponential((load(teacher + i) - max_t) / temperature) * scale_t;
      } else if (soft) {
        const C log_q = s / temperature - log_s, log_p = (load(teacher + i) - max_t) / temperature - log_t;
        const C e = exponential(s / temperature);
        g = e == static_cast<C>(0) ? e : e * scale_s * (term(task.divergence, skew, log_p, log_q).slope - centre);
      }
      if (hard) {
        g += exponential(s) * scale_hard - spread - (i == label ? at_label : static_cast<C>(0));
      }
      put(grad + i, g);
    }
  }
}

template <typename Real>
__global__ void reduce_kernel(DistillationTask task) {
  double sum = 0.0;
  for (int64_t row = threadIdx.x; row < task.rows; row += kThreads) {
    sum += task.row_losses[row];
  }
  sum = block_reduce(sum, Add());
  if (threadIdx.x == 0) {
    const double total = *task.total_weight;
    if (task.loss != nullptr) {
      *static_cast<Real*>(task.loss) = static_cast<Real>(task.reduction == Reduction::mean ? sum / total : sum);
    }
    if (task.scale != nullptr) {
      *static_cast<Real*>(task.scale) = static_cast<Real>(task.deferred_mean ? task.total_weight[1] / total : 1.0);
    }
  }
}

template <typename T>
__global__ void scale_gradient_kernel(const T* grad, const Compute<T>* scale, const Compute<T>* upstream,
                                      int64_t elements_per_factor, T* out, int64_t elements) {
  const int64_t stride = static_cast<int64_t>(gridDim.x) * blockDim.x;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; i < elements; i += stride) {
    const double factor = static_cast<double>(*scale) * static_cast<double>(upstream[i / elements_per_factor]);
    put(out + i, load(grad + i) * static_cast<Compute<T>>(factor));
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
  total_weight_kernel<<<1, kThreads, 0, s>>>(task);
  return for_type(task.type, [&](auto tag) {
    using T = decltype(tag);
    const int blocks = static_cast<int>(task.rows < kMaxBlocks ? task.rows : kMaxBlocks);
    distill_rows_kernel<T><<<blocks, kThreads, 0, s>>>(task);
    if (task.type == FloatType::f64) {
      reduce_kernel<double><<<1, kThreads, 0, s>>>(task);
    } else {
      reduce_kernel<float><<<1, kThreads, 0, s>>>(task);
    }
  });
}

int scale_gradient(FloatType type, const void* grad, const void* scale, const void* upstream,
                   int64_t elements_per_factor, void* out, int64_t elements, void* stream) {
  if (elements == 0) {
    return 0;
  }
  return for_type(type, [&](auto tag) {
    using T = decltype(tag);
    const int64_t blocks = (elements + kThreads - 1) / kThreads;
    scale_gradient_kernel<T>
        <<<static_cast<int>(blocks < 132 * 16 ? blocks : 132 * 16), kThreads, 0, static_cast<cudaStream_t>(stream)>>>(
            static_cast<const T*>(grad), static_cast<const Compute<T>*>(scale),
            static_cast<const Compute<T>*>(upstream), elements_per_factor, static_cast<T*>(out), elements);
  });
}

}  // namespace rarefy::cuda
