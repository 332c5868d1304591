// Masks on devices without kernels of their own (a GPU), out of stable sorts: the same elements as on the CPU, ties
// included.
#include <ATen/ops/abs.h>
#include <ATen/ops/arange.h>
#include <ATen/ops/argsort.h>
#include <ATen/ops/bitwise_and.h>
#include <ATen/ops/bitwise_right_shift.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/constant_pad_nd.h>
#include <ATen/ops/ones.h>
#include <ATen/ops/ones_like.h>
#include <ATen/ops/tensor.h>
#include <rarefy/ops/mask.h>
#include <torch/library.h>

#include "ops/mask_checks.h"

namespace rarefy::ops {
namespace {

void check_no_nan(const char* subject, const at::Tensor& x, size_t index) {
  const auto bad = x.isnan().flatten().nonzero();
  TORCH_CHECK_VALUE(bad.numel() == 0, subject, " must not be NaN, got NaN in tensor ", index, " at flat index ",
                    bad[0].item<int64_t>());
}

/// The order along the last dimension: what is not alive first, then ascending, of equal ones the earlier first.
at::Tensor ascending(const at::Tensor& keys, const at::Tensor& alive) {
  const auto order = at::argsort(keys, /*stable=*/true, -1, /*descending=*/false);
  if (!alive.defined()) {
    return order;
  }
  const auto dead_first = at::argsort(alive.gather(-1, order).to(at::kByte), /*stable=*/true, -1, false);
  return order.gather(-1, dead_first);
}

at::Tensor pack_mask_anywhere(const at::Tensor& kept) {
  TORCH_CHECK_TYPE(kept.scalar_type() == at::kBool, "[pack_mask] kept must be bool, got ", kept.scalar_type());
  const int64_t bytes = mask_bytes(kept.numel());
  const auto bits = at::constant_pad_nd(kept.reshape({-1}).to(at::kByte), {0, bytes * 8 - kept.numel()});
  const auto places = at::tensor({1, 2, 4, 8, 16, 32, 64, 128}, bits.options());
  return bits.view({bytes, 8}).mul(places).sum({1}, /*keepdim=*/false, at::kByte);
}

at::Tensor unpack_mask_anywhere(const at::Tensor& mask, c10::SymIntArrayRef size) {
  check_unpack_mask(mask, size);
  const auto sizes = C10_AS_INTARRAYREF_SLOW(size);
  const auto shifts = at::arange(8, mask.options());
  const auto bits = at::bitwise_and(at::bitwise_right_shift(mask.reshape({-1, 1}), shifts), 1).to(at::kBool);
  return bits.view({-1}).slice(0, 0, c10::multiply_integers(sizes)).view(sizes);
}

std::vector<at::Tensor> score_mask_anywhere(at::TensorList scores, double sparsity,
                                            std::optional<at::TensorList> masks) {
  check_magnitude_mask("score_mask", "score", scores, sparsity, masks);
  bool is_double = false;
  for (const auto& score : scores) {
    is_double = is_double || score.scalar_type() == at::kDouble;
  }
  std::vector<at::Tensor> keys, alive;
  for (size_t i = 0; i < scores.size(); ++i) {
    check_no_nan("[score_mask] scores", scores[i], i);
    keys.push_back(scores[i].reshape({-1}).to(is_double ? at::kDouble : at::kFloat) + 0.0);  // -0 becomes 0
    if (masks.has_value()) {
      alive.push_back(unpack_mask_anywhere((*masks)[i], keys.back().sym_sizes()));
    }
  }
  const auto all_alive = masks.has_value() ? at::cat(alive) : at::Tensor();
  const auto order = ascending(at::cat(keys), all_alive);
  const int64_t total = order.numel();
  const int64_t dead = masks.has_value() ? total - all_alive.sum().item<int64_t>() : 0;
  auto kept = at::ones({total}, order.options().dtype(at::kBool));
  kept.index_fill_(0, order.slice(0, 0, std::max(dead, elements_to_prune(sparsity, total))), false);
  std::vector<at::Tensor> out;
  for (int64_t begin = 0; const auto& part : keys) {
    out.push_back(pack_mask_anywhere(kept.narrow(0, begin, part.numel())));
    begin += part.numel();
  }
  return out;
}

at::Tensor nm_mask_anywhere(const at::Tensor& x, int64_t n, int64_t m, int64_t dim_,
                            const std::optional<at::Tensor>& mask, bool magnitude) {
  const int64_t dim = check_nm_mask(x, n, m, dim_, mask);
  check_no_nan("[nm_mask] x", x, 0);
  const auto keys = (magnitude ? x.abs() : x + 0.0).movedim(dim, -1);
  const auto alive = mask.has_value() ? unpack_mask_anywhere(*mask, x.sym_sizes()).movedim(dim, -1) : at::Tensor();
  const int64_t size = x.size(dim), rest = size % m;
  const auto kept_of = [&](int64_t begin, int64_t length, int64_t group) {
    auto shape = keys.sizes().vec();
    shape.back() = length / group;
    shape.push_back(group);
    const auto part = [&](const at::Tensor& tensor) { return tensor.narrow(-1, begin, length).reshape(shape); };
    const auto mine = alive.defined() ? part(alive) : at::Tensor();
    const auto order = ascending(part(keys), mine);
    auto kept =
        at::ones_like(order, at::kBool).scatter(-1, order.narrow(-1, 0, std::max<int64_t>(group - n, 0)), false);
    if (mine.defined()) {
      kept = at::bitwise_and(kept, mine);
    }
    return kept.flatten(-2);
  };
  auto kept = kept_of(0, size - rest, m);
  if (rest > 0) {
    kept = at::cat({kept, kept_of(size - rest, rest, rest)}, -1);
  }
  return pack_mask_anywhere(kept.movedim(-1, dim));
}

}  // namespace

TORCH_LIBRARY_IMPL(rarefy, CompositeExplicitAutograd, m) {
  m.impl("score_mask", &score_mask_anywhere);
  m.impl("nm_mask", &nm_mask_anywhere);
  m.impl("pack_mask", &pack_mask_anywhere);
  m.impl("unpack_mask", &unpack_mask_anywhere);
}

}  // namespace rarefy::ops
