#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/library.h>

namespace rarefy::ops {
namespace {

/// Integer inference has no derivative: its results do not require a gradient.
void not_differentiable(const c10::OperatorHandle& op, c10::DispatchKeySet keys, torch::jit::Stack* stack) {
  at::AutoDispatchBelowAutograd guard;
  op.redispatchBoxed(keys & c10::after_autograd_keyset, stack);
}

}  // namespace

TORCH_LIBRARY_IMPL(rarefy, Autograd, m) {
  for (const auto* name : {"quantized_linear", "quantized_conv", "quantized_add", "requantize", "max_pool2d_bytes",
                           "quantized_conv_transpose"}) {
    m.impl(name, torch::CppFunction::makeFromBoxedFunction<&not_differentiable>());
  }
}

}  // namespace rarefy::ops
