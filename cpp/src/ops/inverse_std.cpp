#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/add.h>
#include <ATen/ops/rsqrt.h>
#include <rarefy/ops/inverse_std.h>
#include <torch/library.h>

namespace rarefy::ops {
namespace {

at::Tensor inverse_std_kernel(const at::Tensor& running_var, double eps) { return at::rsqrt(running_var + eps); }

}  // namespace

at::Tensor inverse_std(const at::Tensor& running_var, double eps) {
  static const auto op =
      c10::Dispatcher::singleton().findSchemaOrThrow("rarefy::inverse_std", "").typed<decltype(inverse_std)>();
  return op.call(running_var, eps);
}

TORCH_LIBRARY_FRAGMENT(rarefy, m) { m.def("inverse_std(Tensor running_var, float eps) -> Tensor"); }

// One kernel for every backend, meta tensors included.
TORCH_LIBRARY_IMPL(rarefy, CompositeExplicitAutograd, m) { m.impl("inverse_std", &inverse_std_kernel); }

}  // namespace rarefy::ops
