#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

namespace rarefy::ops {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::Variable;
using torch::autograd::variable_list;

using Signature = at::Tensor(const at::Tensor&, const at::Tensor&, const at::Tensor&, const at::Tensor&,
                             const std::optional<at::Tensor>&);

at::Tensor below_autograd(const at::Tensor& x, const at::Tensor& values, const at::Tensor& columns,
                          const at::Tensor& row_offsets, const std::optional<at::Tensor>& bias) {
  static const auto op = c10::Dispatcher::singleton().findSchemaOrThrow("rarefy::sparse_linear", "").typed<Signature>();
  at::AutoDispatchBelowADInplaceOrView guard;
  return op.call(x, values, columns, row_offsets, bias);
}

/// A forward pass that may be part of a graph, whose backward pass says that there is none.
class SparseLinear : public torch::autograd::Function<SparseLinear> {
 public:
  static Variable forward(AutogradContext*, const Variable& x, const Variable& values, const Variable& columns,
                          const Variable& row_offsets, const std::optional<at::Tensor>& bias) {
    return below_autograd(x, values, columns, row_offsets, bias);
  }
  static variable_list backward(AutogradContext*, const variable_list&) {
    TORCH_CHECK_NOT_IMPLEMENTED(
        false,
        "[sparse_linear] is for inference and has no gradient: train the dense model, or to_dense() this one first");
  }
};

at::Tensor sparse_linear_autograd(const at::Tensor& x, const at::Tensor& values, const at::Tensor& columns,
                                  const at::Tensor& row_offsets, const std::optional<at::Tensor>& bias) {
  if (at::GradMode::is_enabled() &&
      (x.requires_grad() || values.requires_grad() || (bias.has_value() && bias->requires_grad()))) {
    return SparseLinear::apply(x, values, columns, row_offsets, bias);
  }
  return below_autograd(x, values, columns, row_offsets, bias);
}

}  // namespace

TORCH_LIBRARY_IMPL(rarefy, Autograd, m) { m.impl("sparse_linear", &sparse_linear_autograd); }

}  // namespace rarefy::ops
