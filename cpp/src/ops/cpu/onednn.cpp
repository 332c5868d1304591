#include "ops/cpu/onednn.h"

#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/relu.h>
#include <ATen/ops/zeros.h>
#include <c10/util/Exception.h>

#include <string_view>

namespace rarefy::ops::onednn {
namespace {

using Ints = torch::List<int64_t>;
using Scalars = torch::List<std::optional<c10::Scalar>>;

template <typename Signature>
c10::TypedOperatorHandle<Signature> find(const char* name) {
  const auto schema = c10::Dispatcher::singleton().findSchema({name, ""});
  TORCH_CHECK_NOT_IMPLEMENTED(schema.has_value(), "[onednn] this LibTorch has no operator ", name,
                              ": int8 execution on the CPU needs a build with oneDNN");
  return schema->typed<Signature>();
}

Ints in_two(at::IntArrayRef values, int64_t front) {
  Ints out;
  if (values.size() == 1) {
    out.push_back(front);
  }
  for (const auto value : values) {
    out.push_back(value);
  }
  return out;
}

at::Tensor no_zero_points(const at::Tensor& weight_scale) {
  return at::zeros(weight_scale.sizes(), weight_scale.options().dtype(at::kInt));
}

}  // namespace

Movement::Movement(const char* function, int64_t dims, at::IntArrayRef stride_, at::IntArrayRef padding_,
                   at::IntArrayRef dilation_, int64_t groups_)
    : stride(in_two(stride_, 1)), padding(in_two(padding_, 0)), dilation(in_two(dilation_, 1)), groups(groups_) {
  const auto size = static_cast<size_t>(dims);
  TORCH_CHECK_VALUE(stride_.size() == size && padding_.size() == size && dilation_.size() == size, "[", function,
                    "] stride, padding and dilation must have ", dims, " values, got ", stride_, ", ", padding_,
                    " and ", dilation_);
}

bool is_available() {
  auto& dispatcher = c10::Dispatcher::singleton();
  return dispatcher.findSchema({"onednn::qlinear_pointwise", ""}).has_value() &&
         dispatcher.findSchema({"onednn::qconv_pointwise", ""}).has_value();
}

at::Tensor with_height(const at::Tensor& x) { return x.dim() == 3 ? x.unsqueeze(2) : x; }

at::Tensor pack_linear(const at::Tensor& weight) {
  using Signature = at::Tensor(at::Tensor, std::optional<Ints>);
  static const auto prepack = find<Signature>("onednn::qlinear_prepack");
  return prepack.call(weight.contiguous(), std::nullopt);
}

at::Tensor pack_conv(const at::Tensor& weight, const at::Tensor& weight_scale, const Movement& movement,
                     at::IntArrayRef input_size, int64_t input_zero_point) {
  using Signature = at::Tensor(at::Tensor, at::Tensor, double, int64_t, Ints, Ints, Ints, int64_t, std::optional<Ints>);
  static const auto prepack = find<Signature>("onednn::qconv_prepack");
  return prepack.call(with_height(weight), weight_scale, 1.0, input_zero_point, movement.stride, movement.padding,
                      movement.dilation, movement.groups, Ints(input_size));
}

at::Tensor linear(const at::Tensor& q, double scale, int64_t zero_point, const at::Tensor& packed,
                  const at::Tensor& weight_scale, const std::optional<at::Tensor>& bias, bool relu) {
  using Signature =
      at::Tensor(at::Tensor, double, int64_t, at::Tensor, at::Tensor, at::Tensor, std::optional<at::Tensor>, double,
                 int64_t, std::optional<c10::ScalarType>, std::string_view, Scalars, std::string_view);
  static const auto multiply = find<Signature>("onednn::qlinear_pointwise");
  return multiply.call(q, scale, zero_point, packed, weight_scale, no_zero_points(weight_scale), bias, 1.0, 0,
                       at::kFloat, relu ? "relu" : "none", Scalars(), "");
}

at::Tensor conv(const at::Tensor& q, double scale, int64_t zero_point, const at::Tensor& packed,
                const at::Tensor& weight_scale, const std::optional<at::Tensor>& bias, const Movement& movement,
                bool relu) {
  using Signature =
      at::Tensor(at::Tensor, double, int64_t, at::Tensor, at::Tensor, at::Tensor, std::optional<at::Tensor>, Ints, Ints,
                 Ints, int64_t, double, int64_t, std::optional<c10::ScalarType>, std::string_view, Scalars,
                 std::optional<std::string_view>);
  static const auto convolve = find<Signature>("onednn::qconv_pointwise");
  const bool fused = relu && q.dim() < 5;  // the operator takes no ReLU in three dimensions
  auto out = convolve.call(q, scale, zero_point, packed, weight_scale, no_zero_points(weight_scale), bias,
                           movement.stride, movement.padding, movement.dilation, movement.groups, 1.0, 0, at::kFloat,
                           fused ? "relu" : "none", Scalars(), std::nullopt);
  if (relu && !fused) {
    at::relu_(out);
  }
  return out;
}

}  // namespace rarefy::ops::onednn
