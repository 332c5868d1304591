#include "ops/cpu/gradient_matmul.h"

#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/mm.h>
#include <torch/library.h>

namespace rarefy::ops {

at::Tensor matmul_transposed(const at::Tensor& a, const at::Tensor& b) {
  using Signature = at::Tensor(const at::Tensor&, const at::Tensor&, const std::optional<at::Tensor>&, std::string_view,
                               torch::List<std::optional<c10::Scalar>>, std::optional<std::string_view>);
  static const auto schema = c10::Dispatcher::singleton().findSchema({"mkldnn::_linear_pointwise", ""});
  if (a.scalar_type() != at::kFloat || !schema.has_value() || a.numel() == 0 || b.numel() == 0) {
    return at::mm(a, b.t());
  }
  static const auto linear = schema->typed<Signature>();
  return linear.call(a, b, std::nullopt, "none", torch::List<std::optional<c10::Scalar>>(), "");
}

}  // namespace rarefy::ops
