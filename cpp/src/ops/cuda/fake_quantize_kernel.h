// Launchers of the CUDA kernels of the fake-quantize family. Plain pointers and a stream: no torch header, so that nvcc
// compiles the .cu beside any build of torch. Every launcher returns the cudaError_t of its launch as int.
#pragma once

#include <stdint.h>

namespace rarefy::cuda {

enum class FloatType { f32, f64, bf16, f16 };

/// A dense tensor in memory order; element i belongs to channel (i / inner) % channels.
struct Layout {
  FloatType type;
  int64_t elements;
  int64_t channels;
  int64_t inner;
};

/// Device arrays of `channels` values; the scales are double for FloatType::f64 and float otherwise.
struct Grid {
  const void* scale;
  const int32_t* zero_point;
  int qmin;
  int qmax;
};

/// mask may be null; otherwise it has one bit per element, in whole 64-bit words that are filled up with 0.
int fake_quantize(const void* x, void* y, void* mask, Layout layout, Grid grid, void* stream);
int mask_gradient(const void* grad, const void* mask, void* out, Layout layout, void* stream);
int quantize(const void* x, void* y, Layout layout, Grid grid, void* stream);

/// Range of each channel into encoded[0, channels) and encoded[channels, 2 * channels) (see decode in the .cu), and
/// encoded[2 * channels] = 1 when a value is not finite. `encoded` has 2 * channels + 1 uint32 values.
int min_max(const void* x, uint32_t* encoded, Layout layout, void* stream);

struct ObserverState {
  float* min_val;
  float* max_val;
  float* scale;
  int32_t* zero_point;
  int64_t* skipped;  // one value
};

/// Updates the state from the encoded ranges. When the not-finite flag is set the range stays, the batch is counted in
/// `skipped`, and a channel without a range gets the parameters of [0, 0]. constant <= 0: running range.
int update_observer(const uint32_t* encoded, ObserverState state, int64_t channels, double constant, int64_t qmin,
                    int64_t qmax, bool symmetric, void* stream);

const char* error_string(int error);

}  // namespace rarefy::cuda
