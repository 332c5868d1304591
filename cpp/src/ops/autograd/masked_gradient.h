// The backward pass of operators whose gradient is kept or dropped element by element, by a packed mask.
#pragma once

#include <ATen/core/dispatch/Dispatcher.h>
#include <c10/core/impl/TorchDispatchModeTLS.h>
#include <rarefy/ops/fake_quantize.h>
#include <torch/csrc/autograd/custom_function.h>

namespace rarefy::ops {

/// Whether nobody but the caller can see the gradient's memory, so that it may be overwritten: torch's own accumulation
/// of gradients takes buffers over on the same grounds. Only plain tensors, so that tracing never meets a mutation.
inline bool is_ours_alone(const at::Tensor& grad, at::IntArrayRef strides) {
  constexpr c10::DispatchKeySet plain({c10::DispatchKey::CPU, c10::DispatchKey::CUDA, c10::DispatchKey::ADInplaceOrView,
                                       c10::DispatchKey::AutogradCPU, c10::DispatchKey::AutogradCUDA,
                                       c10::DispatchKey::AutocastCPU, c10::DispatchKey::AutocastCUDA});
  return !at::GradMode::is_enabled() && grad.use_count() == 1 && plain.isSupersetOf(grad.key_set()) &&
         !c10::impl::TorchDispatchModeTLS::any_modes_set() && grad.storage().use_count() == 1 &&
         grad.is_non_overlapping_and_dense() && grad.strides() == strides;
}

inline void mask_in_place(at::Tensor grad, const at::Tensor& mask) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("rarefy::fake_quantize_backward_", "")
                             .typed<void(at::Tensor&, const at::Tensor&)>();
  op.call(grad, mask);
}

/// What save() kept, applied to the first of `grads`.
inline at::Tensor masked(torch::autograd::AutogradContext* ctx, const torch::autograd::variable_list& grads) {
  const auto strides = ctx->saved_data["strides"].toSymIntVector();
  const auto mask = ctx->get_saved_variables()[0];
  const auto concrete = c10::asIntArrayRefSlowOpt(strides);
  if (concrete.has_value() && is_ours_alone(grads[0], *concrete)) {
    mask_in_place(grads[0], mask);
    return grads[0];
  }
  return fake_quantize_backward(grads[0], mask, strides);
}

inline void save(torch::autograd::AutogradContext* ctx, const at::Tensor& mask, c10::SymIntArrayRef strides) {
  ctx->save_for_backward({mask});
  ctx->saved_data["strides"] = strides.vec();
}

inline bool is_differentiated(const at::Tensor& x) { return x.requires_grad() && at::GradMode::is_enabled(); }

}  // namespace rarefy::ops
