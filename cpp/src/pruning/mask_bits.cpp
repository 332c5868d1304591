#include <ATen/ops/arange.h>
#include <ATen/ops/constant_pad_nd.h>
#include <c10/util/Exception.h>
#include <rarefy/pruning/mask_bits.h>

#include "ops/mask_checks.h"

namespace rarefy::pruning {
namespace {

/// The mask as a matrix: dimension 0 by all others.
at::Tensor as_matrix(const at::Tensor& kept) { return kept.reshape({kept.size(0), -1}); }

/// `x` with dimension `dim` padded with false to a multiple of `size`.
at::Tensor padded(const at::Tensor& x, int64_t dim, int64_t size) {
  const int64_t missing = (size - x.size(dim) % size) % size;
  std::vector<int64_t> pad(static_cast<size_t>(2 * (x.dim() - dim)), 0);
  pad.back() = missing;
  return missing == 0 ? x : at::constant_pad_nd(x, pad, 0);
}

/// True when each row is all true or all false.
bool is_whole(const at::Tensor& rows) {
  return rows.size(1) == 0 || rows.all(1).eq(rows.any(1)).all().item<bool>();
}

struct Holds {
  at::Tensor kept;

  bool operator()(const Unstructured&) const { return true; }
  bool operator()(const NM& nm) const {
    const auto groups = padded(kept.transpose(0, 1).reshape({kept.size(1), -1}), 0, nm.m);
    return groups.reshape({groups.size(0) / nm.m, nm.m, -1}).sum(1).le(nm.n).all().item<bool>();
  }
  bool operator()(const Block& block) const {
    // A block at the edge is smaller; what it is padded with must not count, so both kinds of elements are padded.
    const auto blocks = [&](const at::Tensor& x) {
      const auto whole = padded(padded(as_matrix(x), 0, block.rows), 1, block.columns);
      return whole.reshape({whole.size(0) / block.rows, block.rows, whole.size(1) / block.columns, block.columns})
          .permute({0, 2, 1, 3})
          .reshape({-1, block.rows * block.columns})
          .any(1);
    };
    return !blocks(kept).logical_and(blocks(kept.logical_not())).any().item<bool>();
  }
  bool operator()(const Row&) const { return is_whole(as_matrix(kept)); }
  bool operator()(const Column&) const { return is_whole(as_matrix(kept.transpose(0, 1))); }
  bool operator()(const Filter&) const { return is_whole(as_matrix(kept)); }
  bool operator()(const Head& head) const { return is_whole(kept.reshape({kept.size(0) / head.size, -1})); }
};

}  // namespace

at::Tensor pack_mask(const at::Tensor& kept) {
  TORCH_CHECK_TYPE(kept.scalar_type() == at::kBool, "[pack_mask] the mask must be bool, got ", kept.scalar_type());
  const auto bits = padded(kept.contiguous().view(-1), 0, 64).to(at::kByte).view({-1, 8});
  const auto weights = at::arange(8, bits.options()).exp2().to(at::kByte);
  return bits.mul(weights).sum(1, /*keepdim=*/false, at::kByte);
}

at::Tensor unpack_mask(const at::Tensor& mask, c10::IntArrayRef sizes) {
  const int64_t elements = c10::multiply_integers(sizes);
  TORCH_CHECK_VALUE(mask.scalar_type() == at::kByte && mask.dim() == 1 && mask.numel() == ops::mask_bytes(elements),
                    "[unpack_mask] the mask must hold ", ops::mask_bytes(elements), " bytes (uint8) for shape ", sizes,
                    ", got ", mask.numel(), " of ", mask.scalar_type());
  const auto weights = at::arange(8, mask.options()).exp2().to(at::kByte);
  return mask.unsqueeze(1).bitwise_and(weights).ne(0).view(-1).slice(0, 0, elements).view(sizes);
}

bool holds_pattern(const Pattern& pattern, const at::Tensor& kept) {
  const auto problem = misfit(pattern, kept.sizes());
  TORCH_CHECK_VALUE(problem.empty(), "[holds_pattern] ", problem);
  return kept.numel() == 0 || std::visit(Holds{kept}, pattern);
}

}  // namespace rarefy::pruning
