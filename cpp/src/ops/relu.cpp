#include <ATen/core/dispatch/Dispatcher.h>
#include <rarefy/ops/relu.h>
#include <torch/library.h>

TORCH_LIBRARY_FRAGMENT(rarefy, m) {
  m.def("relu(Tensor x) -> Tensor");
  m.def("relu_(Tensor(a!) x) -> ()");
  m.def("relu_mask(Tensor x) -> (Tensor, Tensor)");
  m.def("relu_mask_(Tensor(a!) x) -> Tensor");
}

namespace rarefy::ops {

at::Tensor relu(const at::Tensor& x) {
  static const auto op =
      c10::Dispatcher::singleton().findSchemaOrThrow("rarefy::relu", "").typed<at::Tensor(const at::Tensor&)>();
  return op.call(x);
}

void relu_(at::Tensor& x) {
  static const auto op = c10::Dispatcher::singleton().findSchemaOrThrow("rarefy::relu_", "").typed<void(at::Tensor&)>();
  op.call(x);
}

std::tuple<at::Tensor, at::Tensor> relu_mask(const at::Tensor& x) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("rarefy::relu_mask", "")
                             .typed<std::tuple<at::Tensor, at::Tensor>(const at::Tensor&)>();
  return op.call(x);
}

}  // namespace rarefy::ops
