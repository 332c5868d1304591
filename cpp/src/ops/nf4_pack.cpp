#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/constant_pad_nd.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/isfinite.h>
#include <ATen/ops/ones_like.h>
#include <ATen/ops/searchsorted.h>
#include <ATen/ops/stack.h>
#include <ATen/ops/tensor.h>
#include <ATen/ops/where.h>
#include <rarefy/ops/nf4_pack.h>
#include <torch/library.h>

#include <tuple>

#include "ops/nf4.h"

TORCH_LIBRARY_FRAGMENT(rarefy, m) {
  m.def("pack_nf4(Tensor weight, int block=64, int scale_block=256) -> (Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "unpack_nf4(Tensor codes, Tensor scale_codes, Tensor scale_steps, Tensor scale_mean, int columns, int block=64, "
      "int scale_block=256, ScalarType dtype=float) -> Tensor");
}

namespace rarefy::ops {
namespace {

constexpr double kSmallestNf4Scale = 0x1p-60;  // as that of every grid

using Packed = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor>;

int64_t size_of(const at::Tensor& x, int64_t axis) { return x.sym_size(axis).guard_int(__FILE__, __LINE__); }

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

at::Tensor list(at::ArrayRef<float> values, const at::Tensor& near) {
  return at::tensor(values, at::kFloat).to(near.device());
}

/// [rows, columns] as [rows * blocks, block], padded with zeros.
at::Tensor to_rows(const at::Tensor& x, int64_t block) {
  const auto more = ceil_div(size_of(x, -1), block) * block - size_of(x, -1);
  return (more == 0 ? x : at::constant_pad_nd(x, {0, more})).reshape({-1, block});
}

void check_blocks(const char* function, int64_t block, int64_t scale_block) {
  TORCH_CHECK_VALUE(block > 0 && scale_block > 0, "[", function, "] block and scale_block must be at least 1, got ",
                    block, " and ", scale_block);
}

/// The scales that come back from 8 bits, [count].
at::Tensor scales_of(const at::Tensor& codes, const at::Tensor& steps, const at::Tensor& mean, int64_t scale_block) {
  const auto wide = to_rows(codes.to(at::kFloat).unsqueeze(0), scale_block) * steps.unsqueeze(1) + mean;
  return wide.reshape({-1}).narrow(0, 0, size_of(codes, 0)).clamp_min(kSmallestNf4Scale);
}

Packed pack_nf4_any(const at::Tensor& weight, int64_t block, int64_t scale_block) {
  TORCH_CHECK_TYPE(weight.is_floating_point(), "[pack_nf4] weight must be floating point, got ", weight.scalar_type());
  TORCH_CHECK_VALUE(weight.dim() == 2 && weight.sym_numel() > 0,
                    "[pack_nf4] weight must have 2 dimensions and no empty one, got shape ", weight.sym_sizes());
  check_blocks("pack_nf4", block, scale_block);
  const auto w = weight.detach().to(at::kFloat);
  TORCH_CHECK_VALUE(at::isfinite(w).all().item<bool>(), "[pack_nf4] weight must be finite, but is not");
  const auto rows = to_rows(w, block);
  const auto largest = rows.abs().amax(1);
  const auto scale = at::where(largest.eq(0.0), at::ones_like(largest), largest.clamp_min(kSmallestNf4Scale));
  const auto mean = scale.to(at::kDouble).mean().to(at::kFloat).reshape({1});
  const auto deviations = to_rows((scale - mean).unsqueeze(0), scale_block);
  const auto greatest = deviations.abs().amax(1);
  const auto steps = at::where(greatest.eq(0.0), at::ones_like(greatest),
                               (greatest.to(at::kDouble) / 127.0).to(at::kFloat).clamp_min(kSmallestNf4Scale));
  const auto scale_codes = (deviations / steps.unsqueeze(1))
                               .round()
                               .clamp(-127, 127)
                               .to(at::kChar)
                               .reshape({-1})
                               .narrow(0, 0, size_of(scale, 0))
                               .clone();
  const auto back = scales_of(scale_codes, steps, mean, scale_block);
  auto codes = at::searchsorted(list(kNormalFloatBounds, w), (rows / back.unsqueeze(1)).contiguous())
                   .to(at::kByte)
                   .view({size_of(w, 0), -1})
                   .narrow(1, 0, size_of(w, 1));
  if (size_of(w, 1) % 2 != 0) {
    codes = at::constant_pad_nd(codes, {0, 1});
  }
  const auto pairs = codes.reshape({size_of(w, 0), -1, 2});
  return {pairs.select(2, 0) | pairs.select(2, 1).bitwise_left_shift(4), scale_codes, steps, mean};
}

at::Tensor unpack_nf4_any(const at::Tensor& codes, const at::Tensor& scale_codes, const at::Tensor& scale_steps,
                          const at::Tensor& scale_mean, int64_t columns, int64_t block, int64_t scale_block,
                          at::ScalarType dtype) {
  check_blocks("unpack_nf4", block, scale_block);
  TORCH_CHECK_TYPE(codes.scalar_type() == at::kByte && scale_codes.scalar_type() == at::kChar,
                   "[unpack_nf4] codes must be uint8 and scale_codes int8, got ", codes.scalar_type(), " and ",
                   scale_codes.scalar_type());
  const auto blocks = ceil_div(columns, block);
  TORCH_CHECK_VALUE(
      codes.dim() == 2 && columns > 0 && size_of(codes, 1) == ceil_div(columns, 2) && scale_codes.dim() == 1 &&
          scale_steps.dim() == 1 && size_of(scale_codes, 0) == size_of(codes, 0) * blocks &&
          size_of(scale_steps, 0) == ceil_div(size_of(scale_codes, 0), scale_block) && scale_mean.sym_numel() == 1,
      "[unpack_nf4] codes, scales and ", columns, " columns must fit together, got shapes ", codes.sym_sizes(), ", ",
      scale_codes.sym_sizes(), ", ", scale_steps.sym_sizes(), " and ", scale_mean.sym_sizes());
  const auto pairs = at::stack({codes.bitwise_and(15), codes.bitwise_right_shift(4)}, 2);
  const auto indices = pairs.view({size_of(codes, 0), -1}).narrow(1, 0, columns);
  const auto values = list(kNormalFloat, codes).index_select(0, indices.reshape({-1}).to(at::kInt));
  const auto scales = scales_of(scale_codes, scale_steps, scale_mean, scale_block);
  const auto rows = to_rows(values.view({size_of(codes, 0), columns}), block) * scales.unsqueeze(1);
  return rows.view({size_of(codes, 0), -1}).narrow(1, 0, columns).to(dtype).contiguous();
}

c10::SymInt ceil_div(const c10::SymInt& a, int64_t b) { return (a + b - 1) / b; }

Packed pack_nf4_meta(const at::Tensor& weight, int64_t block, int64_t scale_block) {
  check_blocks("pack_nf4", block, scale_block);
  const auto options = weight.options();
  const auto scales = weight.sym_size(0) * ceil_div(weight.sym_size(1), block);
  return {at::empty_symint({weight.sym_size(0), ceil_div(weight.sym_size(1), 2)}, options.dtype(at::kByte)),
          at::empty_symint({scales}, options.dtype(at::kChar)),
          at::empty_symint({ceil_div(scales, scale_block)}, options.dtype(at::kFloat)),
          at::empty({1}, options.dtype(at::kFloat))};
}

at::Tensor unpack_nf4_meta(const at::Tensor& codes, const at::Tensor& /*scale_codes*/,
                           const at::Tensor& /*scale_steps*/, const at::Tensor& /*scale_mean*/, int64_t columns,
                           int64_t block, int64_t scale_block, at::ScalarType dtype) {
  check_blocks("unpack_nf4", block, scale_block);
  return at::empty_symint({codes.sym_size(0), columns}, codes.options().dtype(dtype));
}

/// Codes have no derivative: results do not require a gradient.
void not_differentiable(const c10::OperatorHandle& op, c10::DispatchKeySet keys, torch::jit::Stack* stack) {
  at::AutoDispatchBelowAutograd guard;
  op.redispatchBoxed(keys & c10::after_autograd_keyset, stack);
}

}  // namespace

PackedNf4 pack_nf4(const at::Tensor& weight, int64_t block, int64_t scale_block) {
  static const auto op =
      c10::Dispatcher::singleton().findSchemaOrThrow("rarefy::pack_nf4", "").typed<decltype(pack_nf4_any)>();
  auto [codes, scale_codes, steps, mean] = op.call(weight, block, scale_block);
  return {codes, scale_codes, steps, mean};
}

at::Tensor unpack_nf4(const PackedNf4& packed, int64_t columns, int64_t block, int64_t scale_block,
                      at::ScalarType dtype) {
  static const auto op =
      c10::Dispatcher::singleton().findSchemaOrThrow("rarefy::unpack_nf4", "").typed<decltype(unpack_nf4_any)>();
  return op.call(packed.codes, packed.scale_codes, packed.scale_steps, packed.scale_mean, columns, block, scale_block,
                 dtype);
}

TORCH_LIBRARY_IMPL(rarefy, CompositeExplicitAutograd, m) {
  m.impl("pack_nf4", &pack_nf4_any);
  m.impl("unpack_nf4", &unpack_nf4_any);
}

TORCH_LIBRARY_IMPL(rarefy, Meta, m) {
  m.impl("pack_nf4", &pack_nf4_meta);
  m.impl("unpack_nf4", &unpack_nf4_meta);
}

TORCH_LIBRARY_IMPL(rarefy, Autograd, m) {
  for (const auto* name : {"pack_nf4", "unpack_nf4"}) {
    m.impl(name, torch::CppFunction::makeFromBoxedFunction<&not_differentiable>());
  }
}

}  // namespace rarefy::ops
