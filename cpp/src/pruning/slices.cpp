#include "slices.h"

#include <ATen/ExpandUtils.h>
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_strided.h>
#include <ATen/ops/index_select.h>
#include <ATen/ops/tensor.h>
#include <ATen/ops/zeros.h>

#include <algorithm>
#include <cstring>
#include <numeric>

namespace rarefy::pruning {
namespace {

/// One dimension, outermost first: where its slices begin in the source, in elements.
struct Level {
  std::vector<int64_t> offsets;
  int64_t out_stride = 1;
};

template <typename Element>
void gather(const Element* from, Element* to, const std::vector<Level>& levels, size_t level, int64_t block) {
  const auto& here = levels[level];
  const auto count = static_cast<int64_t>(here.offsets.size());
  if (level + 1 < levels.size()) {
    for (int64_t i = 0; i < count; ++i) {
      gather(from + here.offsets[i], to + i * here.out_stride, levels, level + 1, block);
    }
  } else if (block == 1) {
    for (int64_t i = 0; i < count; ++i) {
      to[i] = from[here.offsets[i]];
    }
  } else {
    for (int64_t i = 0; i < count; ++i) {
      std::memcpy(to + i * block, from + here.offsets[i], static_cast<size_t>(block) * sizeof(Element));
    }
  }
}

template <typename Element>
void gather_all(const at::Tensor& from, const at::Tensor& to, const std::vector<Level>& levels, int64_t block) {
  const auto* source = static_cast<const Element*>(from.const_data_ptr());
  auto* target = static_cast<Element*>(to.mutable_data_ptr());
  const auto& first = levels.front();
  const int64_t rows = static_cast<int64_t>(first.offsets.size());
  const int64_t grain = std::max<int64_t>(1, 32768 / std::max<int64_t>(1, to.numel() / std::max<int64_t>(1, rows)));
  at::parallel_for(0, rows, grain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      if (levels.size() > 1) {
        gather(source + first.offsets[i], target + i * first.out_stride, levels, 1, block);
      } else {
        std::memcpy(target + i * block, source + first.offsets[i], static_cast<size_t>(block) * sizeof(Element));
      }
    }
  });
}

at::Tensor take_by_index_select(const at::Tensor& x, const Kept& kept) {
  at::Tensor result = x;
  for (const auto& [dim, indices] : kept) {
    result = at::index_select(result, dim, at::tensor(indices, at::TensorOptions().dtype(at::kLong)).to(x.device()));
  }
  if (result.layout() != at::kStrided) {
    return result;
  }
  auto dense =
      at::empty_strided(result.sizes(), at::infer_dense_strides(result.sizes(), x.strides()), result.options());
  return dense.copy_(result);
}

}  // namespace

at::Tensor take(const at::Tensor& x, const Kept& kept) {
  const bool plain =
      x.layout() == at::kStrided && x.is_cpu() && x.is_non_overlapping_and_dense() && x.numel() > 0 && x.dim() > 0;
  if (!plain) {
    return take_by_index_select(x, kept);
  }
  auto sizes = x.sizes().vec();
  for (const auto& [dim, indices] : kept) {
    sizes[dim] = static_cast<int64_t>(indices.size());
  }
  auto out = at::empty_strided(sizes, at::infer_dense_strides(sizes, x.strides()), x.options());
  if (out.numel() == 0) {
    return out;
  }
  // Dimensions as they lie in memory, the outermost first; those behind the last one that loses slices are one block.
  std::vector<int64_t> order(x.dim());
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) { return x.stride(a) > x.stride(b); });
  std::vector<Level> levels;
  int64_t block = 1;
  size_t blocks_from = order.size();
  while (blocks_from > 0 && !kept.contains(order[blocks_from - 1])) {
    block *= x.size(order[--blocks_from]);
  }
  for (size_t k = 0; k < blocks_from; ++k) {
    const int64_t d = order[k];
    Level level;
    level.out_stride = out.stride(d);
    const auto found = kept.find(d);
    for (int64_t i = 0; i < sizes[d]; ++i) {
      level.offsets.push_back((found == kept.end() ? i : found->second[i]) * x.stride(d));
    }
    levels.push_back(std::move(level));
  }
  if (levels.empty()) {
    return out.copy_(x);
  }
  switch (x.element_size()) {
    case 1:
      gather_all<uint8_t>(x, out, levels, block);
      break;
    case 2:
      gather_all<uint16_t>(x, out, levels, block);
      break;
    case 4:
      gather_all<uint32_t>(x, out, levels, block);
      break;
    case 8:
      gather_all<uint64_t>(x, out, levels, block);
      break;
    default:
      return take_by_index_select(x, kept);
  }
  return out;
}

namespace {

template <typename Element>
void spread_contiguous(const at::Tensor& x, const at::Tensor& out, int64_t dim, const std::vector<int64_t>& from,
                       const std::vector<Element>& values) {
  const int64_t inner = out.stride(dim), size = out.size(dim), kept = x.size(dim);
  const int64_t outer = out.numel() / (inner * size);
  const auto* source = static_cast<const Element*>(x.const_data_ptr());
  auto* target = static_cast<Element*>(out.mutable_data_ptr());
  const int64_t grain = std::max<int64_t>(1, 32768 / (inner * size));
  at::parallel_for(0, outer, grain, [&](int64_t begin, int64_t end) {
    for (int64_t o = begin; o < end; ++o) {
      const auto* rows = source + o * kept * inner;
      auto* places = target + o * size * inner;
      for (int64_t i = 0; i < size; ++i) {
        if (inner == 1) {
          places[i] = from[i] < 0 ? values[i] : rows[from[i]];
        } else if (from[i] < 0) {
          std::fill_n(places + i * inner, inner, values[i]);
        } else {
          std::memcpy(places + i * inner, rows + from[i] * inner, static_cast<size_t>(inner) * sizeof(Element));
        }
      }
    }
  });
}

}  // namespace

at::Tensor spread(const at::Tensor& x, int64_t dim, const std::vector<int64_t>& kept, int64_t size,
                  const at::Tensor& fill) {
  auto sizes = x.sizes().vec();
  sizes[dim] = size;
  const auto values = fill.defined() ? fill.to(x.scalar_type()) : at::zeros({size}, x.options());
  if (x.is_cpu() && x.is_contiguous() && x.numel() > 0 &&
      (x.scalar_type() == at::kFloat || x.scalar_type() == at::kDouble)) {
    std::vector<int64_t> from(size, -1);
    for (size_t i = 0; i < kept.size(); ++i) {
      from[kept[i]] = static_cast<int64_t>(i);
    }
    auto out = at::empty(sizes, x.options());
    const auto flat = values.contiguous();
    if (x.scalar_type() == at::kFloat) {
      const auto* data = flat.const_data_ptr<float>();
      spread_contiguous<float>(x, out, dim, from, {data, data + size});
    } else {
      const auto* data = flat.const_data_ptr<double>();
      spread_contiguous<double>(x, out, dim, from, {data, data + size});
    }
    return out;
  }
  std::vector<int64_t> shape(sizes.size(), 1);
  shape[dim] = size;
  auto out = values.view(shape).expand(sizes).contiguous();
  return out.index_copy_(dim, at::tensor(kept, at::TensorOptions().dtype(at::kLong)).to(x.device()), x);
}

}  // namespace rarefy::pruning
