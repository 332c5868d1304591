// Launchers of the CUDA kernels of distillation_loss. Plain pointers and a stream: no torch header, so that nvcc compiles
// the .cu beside any build of torch. Every launcher returns the cudaError_t of its launch as int.
#pragma once

#include <stdint.h>

#include "ops/cuda/fake_quantize_kernel.h"
#include "ops/divergence.h"

namespace rarefy::cuda {

/// All pointers are to device memory. Real is double for f64 and float otherwise.
struct DistillationTask {
  FloatType type;
  int64_t rows;
  int64_t classes;
  double temperature;
  double alpha;
  Divergence divergence;
  double skew;
  double label_smoothing;
  int64_t ignore_index;
  Reduction reduction;
  bool
      deferred_mean;  // the gradient is of the sum over rows with weights over their largest, w; scale is w / (sum of weights)
  const void* student;        // rows x classes of the type
  const void* teacher;        // the same
  const int64_t* labels;      // one per row, or null
  const double* row_weights;  // one per row, or null
  void* grad;                 // as student, or null when only the loss is wanted
  double* row_losses;         // one per row: weight * loss
  double* total_weight;       // room for two: the sum of the valid rows' weights and their largest
  void* loss;                 // one Real, or null for Reduction::none
  void* scale;                // one Real, or null
};

/// With a weight that is negative or not finite, or a label out of range, results are NaN.
int distillation_loss(const DistillationTask& task, void* stream);

/// out[i] = (*scale * upstream[i / elements_per_factor]) * grad[i], with scale and upstream of Real.
int scale_gradient(FloatType type, const void* grad, const void* scale, const void* upstream,
                   int64_t elements_per_factor, void* out, int64_t elements, void* stream);

}  // namespace rarefy::cuda
