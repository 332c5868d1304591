#include <ATen/ops/where.h>
#include <ATen/ops/zeros_like.h>
#include <rarefy/ops/weight_formats.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include "ops/autograd/not_differentiable.h"
#include "ops/autograd/pass_through.h"
#include "ops/block_views.h"

namespace rarefy::ops {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::Variable;
using torch::autograd::variable_list;

class ClippedAtOne : public torch::autograd::Function<ClippedAtOne> {
 public:
  static Variable forward(AutogradContext* ctx, const Variable& x, std::optional<int64_t> axis,
                          c10::SymIntArrayRef block) {
    at::AutoDispatchBelowADInplaceOrView guard;
    ctx->save_for_backward({x});
    return fake_quantize_binary(x, axis, block, true);
  }
  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const auto inside = ctx->get_saved_variables()[0].abs().le(1.0);
    return {at::where(inside, grads[0], at::zeros_like(grads[0])), {}, {}};
  }
};

class CodebookFunction : public torch::autograd::Function<CodebookFunction> {
 public:
  static Variable forward(AutogradContext* ctx, const Variable& x, const Variable& codebook,
                          std::optional<int64_t> axis, c10::SymIntArrayRef block) {
    at::AutoDispatchBelowADInplaceOrView guard;
    ctx->saved_data["axis"] = axis;
    ctx->saved_data["block"] = block.vec();
    ctx->saved_data["wanted"] = codebook.requires_grad();
    if (codebook.requires_grad()) {
      ctx->save_for_backward({codebook, codebook_indices(x, codebook, axis, block)});
    }
    return fake_quantize_codebook(x, codebook, axis, block);
  }
  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const auto& grad = grads[0];
    if (!ctx->saved_data.at("wanted").toBool()) {
      return {grad, {}, {}, {}};
    }
    const auto saved = ctx->get_saved_variables();
    const auto& axis = ctx->saved_data.at("axis");
    const auto block = ctx->saved_data.at("block").toSymIntVector();
    const auto sharing = check_sharing("fake_quantize_codebook", grad,
                                       axis.isNone() ? std::nullopt : std::optional<int64_t>(axis.toInt()), block);
    // What fills short blocks up has gradient 0.
    const auto by_block = to_blocks(grad.to(at::kFloat), sharing, 0.0);
    const auto codes = to_blocks(saved[1], sharing, 0.0).to(at::kLong);
    const auto flat = at::zeros_like(saved[0].reshape_symint({by_block.sym_size(0), saved[0].sym_size(-1)}));
    return {grad, flat.scatter_add(1, codes, by_block).reshape_symint(saved[0].sym_sizes()), {}, {}};
  }
};

bool is_differentiated(const at::Tensor& x) { return x.requires_grad() && at::GradMode::is_enabled(); }

at::Tensor fake_quantize_binary_autograd(const at::Tensor& x, std::optional<int64_t> axis, c10::SymIntArrayRef block,
                                         bool clipped) {
  if (clipped && is_differentiated(x)) {
    return ClippedAtOne::apply(x, axis, block);
  }
  return pass_through(x, [&] { return fake_quantize_binary(x, axis, block, clipped); });
}

at::Tensor fake_quantize_codebook_autograd(const at::Tensor& x, const at::Tensor& codebook, std::optional<int64_t> axis,
                                           c10::SymIntArrayRef block) {
  if (!is_differentiated(x) && !is_differentiated(codebook)) {
    at::AutoDispatchBelowADInplaceOrView guard;
    return fake_quantize_codebook(x, codebook, axis, block);
  }
  return CodebookFunction::apply(x, codebook, axis, block);
}

}  // namespace

TORCH_LIBRARY_IMPL(rarefy, Autograd, m) {
  m.impl("fake_quantize_binary", &fake_quantize_binary_autograd);
  m.impl("fake_quantize_ternary", &PassThrough<&fake_quantize_ternary>::call);
  m.impl("codebook_indices", &NotDifferentiable<&codebook_indices>::call);
  m.impl("fake_quantize_codebook", &fake_quantize_codebook_autograd);
  m.impl("kmeans_codebook", &NotDifferentiable<&kmeans_codebook>::call);
}

}  // namespace rarefy::ops
