// Masking a gradient, in place where nobody else can see it.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <c10/core/impl/TorchDispatchModeTLS.h>
#include <rarefy/ops/fake_quantize.h>

namespace rarefy::ops {

/// Whether a tensor is nothing but memory on a device: nobody traces, wraps or transforms what happens to it.
inline bool is_plain(const at::Tensor& x) {
  constexpr c10::DispatchKeySet plain({c10::DispatchKey::CPU, c10::DispatchKey::CUDA, c10::DispatchKey::ADInplaceOrView,
                                       c10::DispatchKey::AutogradCPU, c10::DispatchKey::AutogradCUDA,
                                       c10::DispatchKey::AutocastCPU, c10::DispatchKey::AutocastCUDA});
  return plain.isSupersetOf(x.key_set()) && !c10::impl::TorchDispatchModeTLS::any_modes_set();
}

/// Whether nobody but the caller can see the gradient's memory, so that it may be overwritten: torch's own accumulation
/// of gradients takes buffers over on the same grounds. Only plain tensors, so that tracing never meets a mutation.
inline bool is_ours_alone(const at::Tensor& grad, at::IntArrayRef strides) {
  return !at::GradMode::is_enabled() && grad.use_count() == 1 && is_plain(grad) && grad.storage().use_count() == 1 &&
         grad.is_non_overlapping_and_dense() && grad.strides() == strides;
}

/// grad where the mask's bit is 1, else 0, with these strides: in grad's own memory when it is ours alone.
inline at::Tensor mask_gradient(const at::Tensor& grad, const at::Tensor& mask, c10::SymIntArrayRef strides) {
  const auto concrete = c10::asIntArrayRefSlowOpt(strides);
  if (!concrete.has_value() || !is_ours_alone(grad, *concrete)) {
    return fake_quantize_backward(grad, mask, strides);
  }
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("rarefy::fake_quantize_backward_", "")
                             .typed<void(at::Tensor&, const at::Tensor&)>();
  at::Tensor mutated = grad;
  op.call(mutated, mask);
  return grad;
}

}  // namespace rarefy::ops
