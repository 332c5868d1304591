#include <rarefy/ops/formats.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include "ops/autograd/not_differentiable.h"
#include "ops/autograd/pass_through.h"

namespace rarefy::ops {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::Variable;
using torch::autograd::variable_list;

std::optional<int64_t> optional_axis(const AutogradContext* ctx) {
  const auto& axis = ctx->saved_data.at("axis");
  return axis.isNone() ? std::nullopt : std::optional<int64_t>(axis.toInt());
}

void save_sharing(AutogradContext* ctx, std::optional<int64_t> axis, c10::SymIntArrayRef block) {
  ctx->saved_data["axis"] = axis;
  ctx->saved_data["block"] = block.vec();
}

class FakeQuantizeGroup : public torch::autograd::Function<FakeQuantizeGroup> {
 public:
  static Variable forward(AutogradContext* ctx, const Variable& x, const Variable& scale, const Variable& zero_point,
                          std::optional<int64_t> axis, c10::SymIntArrayRef block, int64_t qmin, int64_t qmax,
                          const std::optional<at::Tensor>& seed) {
    at::AutoDispatchBelowADInplaceOrView guard;
    ctx->save_for_backward({x, scale, zero_point});
    save_sharing(ctx, axis, block);
    ctx->saved_data["qmin"] = qmin;
    ctx->saved_data["qmax"] = qmax;
    return fake_quantize_group(x, scale, zero_point, axis, block, qmin, qmax, true, seed);
  }
  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const auto saved = ctx->get_saved_variables();
    const auto block = ctx->saved_data.at("block").toSymIntVector();
    return {fake_quantize_group_backward(grads[0], saved[0], saved[1], saved[2], optional_axis(ctx), block,
                                         ctx->saved_data.at("qmin").toInt(), ctx->saved_data.at("qmax").toInt()),
            {},
            {},
            {},
            {},
            {},
            {},
            {}};
  }
};

class CastMinifloat : public torch::autograd::Function<CastMinifloat> {
 public:
  static Variable forward(AutogradContext* ctx, const Variable& x, const Variable& scale, std::optional<int64_t> axis,
                          c10::SymIntArrayRef block, int64_t exponent_bits, int64_t mantissa_bits, int64_t bias,
                          const std::string& specials, bool saturate, const std::optional<at::Tensor>& seed) {
    at::AutoDispatchBelowADInplaceOrView guard;
    ctx->save_for_backward({x, scale});
    save_sharing(ctx, axis, block);
    ctx->saved_data["shape"] = std::vector<int64_t>{exponent_bits, mantissa_bits, bias};
    ctx->saved_data["specials"] = specials;
    return cast_minifloat(x, scale, axis, block, exponent_bits, mantissa_bits, bias, specials, saturate, true, seed);
  }
  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const auto saved = ctx->get_saved_variables();
    const auto block = ctx->saved_data.at("block").toSymIntVector();
    const auto shape = ctx->saved_data.at("shape").toIntVector();
    return {cast_minifloat_backward(grads[0], saved[0], saved[1], optional_axis(ctx), block, shape[0], shape[1],
                                    shape[2], ctx->saved_data.at("specials").toStringRef()),
            {},
            {},
            {},
            {},
            {},
            {},
            {},
            {},
            {}};
  }
};

/// The backward passes are linear in their gradient, by the same mask again.
class FakeQuantizeGroupBackward : public torch::autograd::Function<FakeQuantizeGroupBackward> {
 public:
  static Variable forward(AutogradContext* ctx, const Variable& grad, const Variable& x, const Variable& scale,
                          const Variable& zero_point, std::optional<int64_t> axis, c10::SymIntArrayRef block,
                          int64_t qmin, int64_t qmax) {
    at::AutoDispatchBelowADInplaceOrView guard;
    ctx->save_for_backward({x, scale, zero_point});
    save_sharing(ctx, axis, block);
    ctx->saved_data["qmin"] = qmin;
    ctx->saved_data["qmax"] = qmax;
    return fake_quantize_group_backward(grad, x, scale, zero_point, axis, block, qmin, qmax);
  }
  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const auto saved = ctx->get_saved_variables();
    const auto block = ctx->saved_data.at("block").toSymIntVector();
    return {fake_quantize_group_backward(grads[0], saved[0], saved[1], saved[2], optional_axis(ctx), block,
                                         ctx->saved_data.at("qmin").toInt(), ctx->saved_data.at("qmax").toInt()),
            {},
            {},
            {},
            {},
            {},
            {},
            {}};
  }
};

class CastMinifloatBackward : public torch::autograd::Function<CastMinifloatBackward> {
 public:
  static Variable forward(AutogradContext* ctx, const Variable& grad, const Variable& x, const Variable& scale,
                          std::optional<int64_t> axis, c10::SymIntArrayRef block, int64_t exponent_bits,
                          int64_t mantissa_bits, int64_t bias, const std::string& specials) {
    at::AutoDispatchBelowADInplaceOrView guard;
    ctx->save_for_backward({x, scale});
    save_sharing(ctx, axis, block);
    ctx->saved_data["shape"] = std::vector<int64_t>{exponent_bits, mantissa_bits, bias};
    ctx->saved_data["specials"] = specials;
    return cast_minifloat_backward(grad, x, scale, axis, block, exponent_bits, mantissa_bits, bias, specials);
  }
  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const auto saved = ctx->get_saved_variables();
    const auto block = ctx->saved_data.at("block").toSymIntVector();
    const auto shape = ctx->saved_data.at("shape").toIntVector();
    return {cast_minifloat_backward(grads[0], saved[0], saved[1], optional_axis(ctx), block, shape[0], shape[1],
                                    shape[2], ctx->saved_data.at("specials").toStringRef()),
            {},
            {},
            {},
            {},
            {},
            {},
            {},
            {}};
  }
};

bool is_differentiated(const at::Tensor& x) { return x.requires_grad() && at::GradMode::is_enabled(); }

at::Tensor fake_quantize_group_autograd(const at::Tensor& x, const at::Tensor& scale, const at::Tensor& zero_point,
                                        std::optional<int64_t> axis, c10::SymIntArrayRef block, int64_t qmin,
                                        int64_t qmax, bool clipped, const std::optional<at::Tensor>& seed) {
  if (clipped && is_differentiated(x)) {
    return FakeQuantizeGroup::apply(x, scale, zero_point, axis, block, qmin, qmax, seed);
  }
  return pass_through(
      x, [&] { return fake_quantize_group(x, scale, zero_point, axis, block, qmin, qmax, clipped, seed); });
}

at::Tensor cast_minifloat_autograd(const at::Tensor& x, const at::Tensor& scale, std::optional<int64_t> axis,
                                   c10::SymIntArrayRef block, int64_t exponent_bits, int64_t mantissa_bits,
                                   int64_t bias, c10::string_view specials, bool saturate, bool clipped,
                                   const std::optional<at::Tensor>& seed) {
  if (clipped && is_differentiated(x)) {
    return CastMinifloat::apply(x, scale, axis, block, exponent_bits, mantissa_bits, bias, std::string(specials),
                                saturate, seed);
  }
  return pass_through(x, [&] {
    return cast_minifloat(x, scale, axis, block, exponent_bits, mantissa_bits, bias, specials, saturate, clipped, seed);
  });
}

at::Tensor fake_quantize_group_backward_autograd(const at::Tensor& grad, const at::Tensor& x, const at::Tensor& scale,
                                                 const at::Tensor& zero_point, std::optional<int64_t> axis,
                                                 c10::SymIntArrayRef block, int64_t qmin, int64_t qmax) {
  if (!is_differentiated(grad)) {
    at::AutoDispatchBelowADInplaceOrView guard;
    return fake_quantize_group_backward(grad, x, scale, zero_point, axis, block, qmin, qmax);
  }
  return FakeQuantizeGroupBackward::apply(grad, x, scale, zero_point, axis, block, qmin, qmax);
}

at::Tensor cast_minifloat_backward_autograd(const at::Tensor& grad, const at::Tensor& x, const at::Tensor& scale,
                                            std::optional<int64_t> axis, c10::SymIntArrayRef block,
                                            int64_t exponent_bits, int64_t mantissa_bits, int64_t bias,
                                            c10::string_view specials) {
  if (!is_differentiated(grad)) {
    at::AutoDispatchBelowADInplaceOrView guard;
    return cast_minifloat_backward(grad, x, scale, axis, block, exponent_bits, mantissa_bits, bias, specials);
  }
  return CastMinifloatBackward::apply(grad, x, scale, axis, block, exponent_bits, mantissa_bits, bias,
                                      std::string(specials));
}

}  // namespace

TORCH_LIBRARY_IMPL(rarefy, Autograd, m) {
  m.impl("fake_quantize_group", &fake_quantize_group_autograd);
  m.impl("cast_minifloat", &cast_minifloat_autograd);
  m.impl("fake_quantize_group_backward", &fake_quantize_group_backward_autograd);
  m.impl("cast_minifloat_backward", &cast_minifloat_backward_autograd);
  m.impl("fake_quantize_dynamic", &PassThrough<&fake_quantize_dynamic>::call);
  m.impl("cast_minifloat_dynamic", &PassThrough<&cast_minifloat_dynamic>::call);
  m.impl("fake_quantize_mx", &PassThrough<&fake_quantize_mx>::call);
  m.impl("fake_quantize_nvfp4", &PassThrough<&fake_quantize_nvfp4>::call);
  m.impl("fake_quantize_nf4", &PassThrough<&fake_quantize_nf4>::call);
  m.impl("group_qparams", &NotDifferentiable<&group_qparams>::call);
  m.impl("minifloat_scale", &NotDifferentiable<&minifloat_scale>::call);
  m.impl("mx_scale", &NotDifferentiable<&mx_scale>::call);
  m.impl("nvfp4_tensor_scale", &NotDifferentiable<&nvfp4_tensor_scale>::call);
  m.impl("nvfp4_scale", &NotDifferentiable<&nvfp4_scale>::call);
  m.impl("nf4_scale", &NotDifferentiable<&nf4_scale>::call);
  m.impl("block_range", &NotDifferentiable<&block_range>::call);
}

}  // namespace rarefy::ops
