// Launchers of the CUDA kernels of distillation_loss. Plain pointers and a stream: no torch header, so that nvcc compiles
// the .cu beside any build of torch. Every launcher returns the cudaError_t of its launch as int.
#pragma once

#include <stdint.h>

#include "ops/cuda/fake_quantize_kernel.h"

namespace rarefy::cuda {

/// All pointers are to device memory. Real is double for f64 and float otherwise.
struct DistillationTask {
  FloatType type;
  int64_t rows;
  int64_t classes;
  double temperature;
  double alpha;
  int64_t ignore_index;
  bool deferred_mean;     // the gradient is of the sum over rows, and scale is 1 / (valid rows)
  const void* student;    // rows x classes of the type
  const void* teacher;    // the same
  const int64_t* labels;  // one per row, or null
  void* grad;             // as student, or null when only the loss is wanted
  double* row_losses;     // room for one per row
  int64_t* valid_rows;    // room for one
  void* loss;             // one Real
  void* scale;            // one Real, or null
};

int distillation_loss(const DistillationTask& task, void* stream);

/// out = (*scale * *upstream) * grad, with scale and upstream one Real each.
int scale_gradient(FloatType type, const void* grad, const void* scale, const void* upstream, void* out,
                   int64_t elements, void* stream);

}  // namespace rarefy::cuda
