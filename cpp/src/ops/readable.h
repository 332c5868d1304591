// Whether an argument rule may look at a tensor's values.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/core/impl/TorchDispatchModeTLS.h>

namespace rarefy::ops {

/// True where the values of a tensor can be looked at without waiting for a device or leaving a graph: real CPU tensors,
/// outside of tracing.
inline bool is_readable(const at::Tensor& tensor) {
  constexpr c10::DispatchKeySet wrapped{c10::DispatchKey::Python, c10::DispatchKey::Functionalize,
                                        c10::DispatchKey::FuncTorchBatched, c10::DispatchKey::FuncTorchGradWrapper};
  return tensor.device().is_cpu() && !tensor.key_set().has_any(wrapped) && !c10::impl::dispatch_mode_enabled();
}

}  // namespace rarefy::ops
