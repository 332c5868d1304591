// What every .cpp beside a .cu needs to launch kernels.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/core/impl/VirtualGuardImpl.h>
#include <c10/util/Exception.h>

#include "ops/cuda/fake_quantize_kernel.h"

namespace rarefy::ops {

/// The current stream of x's device, as a cudaStream_t.
inline void* stream_of(const at::Tensor& x) {
  return reinterpret_cast<void*>(c10::impl::VirtualGuardImpl(x.device().type()).getStream(x.device()).native_handle());
}

/// Throws when a launcher returned an error.
inline void check_launch(const char* function, int error) {
  TORCH_CHECK(error == 0, "[", function, "] CUDA kernel failed to launch: ", cuda::error_string(error));
}

inline cuda::FloatType float_type(const at::Tensor& x) {
  return x.scalar_type() == at::kDouble     ? cuda::FloatType::f64
         : x.scalar_type() == at::kBFloat16 ? cuda::FloatType::bf16
         : x.scalar_type() == at::kHalf     ? cuda::FloatType::f16
                                            : cuda::FloatType::f32;
}

}  // namespace rarefy::ops
