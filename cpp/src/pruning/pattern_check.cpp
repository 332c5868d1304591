#include <ATen/ops/constant_pad_nd.h>
#include <c10/util/Exception.h>
#include <rarefy/pruning/pattern_check.h>

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
bool is_whole(const at::Tensor& rows) { return rows.size(1) == 0 || rows.all(1).eq(rows.any(1)).all().item<bool>(); }

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

bool holds_pattern(const Pattern& pattern, const at::Tensor& kept) {
  const auto problem = misfit(pattern, kept.sizes());
  TORCH_CHECK_VALUE(problem.empty(), "[holds_pattern] ", problem);
  return kept.numel() == 0 || std::visit(Holds{kept}, pattern);
}

}  // namespace rarefy::pruning
