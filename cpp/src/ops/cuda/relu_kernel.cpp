#include "ops/cuda/relu_kernel.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <c10/core/DeviceGuard.h>
#include <c10/core/impl/VirtualGuardImpl.h>
#include <rarefy/ops/relu.h>
#include <torch/library.h>

#include "ops/fake_quantize_checks.h"

namespace rarefy::ops {
namespace {

void relu_mask_into(const at::Tensor& x, const at::Tensor& y, const at::Tensor& mask) {
  const auto type = x.scalar_type() == at::kDouble     ? cuda::FloatType::f64
                    : x.scalar_type() == at::kBFloat16 ? cuda::FloatType::bf16
                    : x.scalar_type() == at::kHalf     ? cuda::FloatType::f16
                                                       : cuda::FloatType::f32;
  auto* stream =
      reinterpret_cast<void*>(c10::impl::VirtualGuardImpl(x.device().type()).getStream(x.device()).native_handle());
  const int error = cuda::relu_mask(type, x.const_data_ptr(), y.data_ptr(), mask.data_ptr(), x.numel(), stream);
  TORCH_CHECK(error == 0, "[relu] CUDA kernel failed to launch: ", cuda::error_string(error));
}

at::Tensor empty_mask(const at::Tensor& x) { return at::empty({mask_bytes(x.numel())}, x.options().dtype(at::kByte)); }

std::tuple<at::Tensor, at::Tensor> relu_mask_cuda(const at::Tensor& x) {
  check_float("relu", x, "input");
  const c10::DeviceGuard guard(x.device());
  const auto in = x.is_non_overlapping_and_dense() ? x : x.clone();
  auto out = at::empty_like(in);
  auto mask = empty_mask(in);
  relu_mask_into(in, out, mask);
  return {out, mask};
}

at::Tensor relu_mask_inplace_cuda(at::Tensor& x) {
  check_float("relu_", x, "input");
  check_dense_strides("relu_", x.sizes(), x.strides());
  const c10::DeviceGuard guard(x.device());
  auto mask = empty_mask(x);
  relu_mask_into(x, x, mask);
  return mask;
}

}  // namespace

TORCH_LIBRARY_IMPL(rarefy, CUDA, m) {
  m.impl("relu_mask", &relu_mask_cuda);
  m.impl("relu_mask_", &relu_mask_inplace_cuda);
}

}  // namespace rarefy::ops
