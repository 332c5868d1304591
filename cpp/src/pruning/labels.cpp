#include "labels.h"

#include <ATen/Functions.h>
#include <ATen/ops/empty_like.h>

#include <algorithm>
#include <numeric>

namespace rarefy::pruning {

int32_t Labels::fresh(int64_t n) {
  const auto first = static_cast<int32_t>(parent_.size());
  parent_.resize(parent_.size() + n);
  std::iota(parent_.begin() + first, parent_.end(), first);
  reason_.resize(parent_.size(), -1);
  return first;
}

int32_t Labels::find(int32_t label) const {
  int32_t root = label;
  while (parent_[root] != root) {
    root = parent_[root];
  }
  while (parent_[label] != root) {
    const int32_t next = parent_[label];
    parent_[label] = root;
    label = next;
  }
  return root;
}

void Labels::unite(int32_t a, int32_t b) {
  a = find(a);
  b = find(b);
  if (a == b) {
    return;
  }
  // The smaller label represents, so that results do not depend on the order of unions.
  const auto [root, child] = std::minmax(a, b);
  parent_[child] = root;
  if (reason_[root] < 0) {
    reason_[root] = reason_[child];
  }
  ++version_;
}

void Labels::pin(int32_t label, int32_t reason) {
  auto& current = reason_[find(label)];
  if (current < 0) {
    current = reason;
    ++version_;
  }
}

int32_t Labels::add_reason(int64_t node, std::string text) {
  reasons.push_back({node, std::move(text)});
  return static_cast<int32_t>(reasons.size()) - 1;
}

std::vector<int64_t> Field::dims() const {
  std::vector<int64_t> out;
  for (int64_t d = 0; d < labels.dim(); ++d) {
    if (varies(d)) {
      out.push_back(d);
    }
  }
  return out;
}

namespace {

/// A dimension of stride 0 repeats one slice.
at::Tensor without_repeats(at::Tensor labels) {
  for (int64_t d = 0; d < labels.dim(); ++d) {
    if (labels.size(d) > 1 && labels.stride(d) == 0) {
      labels = labels.narrow(d, 0, 1);
    }
  }
  return labels;
}

/// Of a contiguous tensor: true when all slices along dim equal the first.
bool repeats(const at::Tensor& labels, int64_t dim) {
  const int64_t size = labels.size(dim), inner = labels.stride(dim);
  const int64_t outer = labels.numel() / (size * inner);
  const auto* data = labels.const_data_ptr<int32_t>();
  for (int64_t o = 0; o < outer; ++o) {
    const auto* block = data + o * size * inner;
    for (int64_t i = 1; i < size; ++i) {
      if (!std::equal(block, block + inner, block + i * inner)) {
        return false;
      }
    }
  }
  return true;
}

}  // namespace

bool update(Labels& labels, Field& field, int32_t reason) {
  if (field.version == labels.version() && field.labels.numel() > 0) {
    return true;
  }
  if (field.labels.numel() == 0) {
    return false;
  }
  auto current = at::empty_like(without_repeats(field.labels), at::MemoryFormat::Contiguous);
  current.copy_(without_repeats(field.labels));
  auto* data = current.mutable_data_ptr<int32_t>();
  bool all_pinned = true;
  for (int64_t i = 0; i < current.numel(); ++i) {
    data[i] = labels.find(data[i]);
    all_pinned = all_pinned && labels.pinned(data[i]);
  }
  if (all_pinned) {
    return false;
  }
  for (int64_t d = 0; d < current.dim(); ++d) {
    if (current.size(d) > 1 && repeats(current, d)) {
      current = current.narrow(d, 0, 1).contiguous();
    }
  }
  if (current.numel() == 1) {
    labels.pin(*current.const_data_ptr<int32_t>(), reason);
    return false;
  }
  field.labels = current;
  field.version = labels.version();
  return true;
}

void unite(Labels& labels, const Field& a, const Field& b) {
  const auto both = at::broadcast_tensors({a.labels, b.labels});
  const auto x = both[0].contiguous(), y = both[1].contiguous();
  const auto* px = x.const_data_ptr<int32_t>();
  const auto* py = y.const_data_ptr<int32_t>();
  for (int64_t i = 0; i < x.numel(); ++i) {
    labels.unite(px[i], py[i]);
  }
}

void unite_along(Labels& labels, Field& field, const std::vector<int64_t>& dims) {
  auto first = field;
  for (auto d : dims) {
    first.labels = first.labels.narrow(d, 0, 1);
  }
  if (first.labels.numel() != field.labels.numel()) {
    unite(labels, field, first);
    field.labels = first.labels;
    field.version = -1;
  }
}

void pin(Labels& labels, const Field& field, int32_t reason) {
  const auto flat = field.labels.contiguous();
  const auto* data = flat.const_data_ptr<int32_t>();
  for (int64_t i = 0; i < flat.numel(); ++i) {
    labels.pin(data[i], reason);
  }
}

bool overlap(const Field& a, const Field& b) {
  for (int64_t d = 0; d < std::min(a.labels.dim(), b.labels.dim()); ++d) {
    if (a.varies(d) && b.varies(d)) {
      return true;
    }
  }
  return false;
}

Field with_rank(const Field& field, int64_t rank) {
  Field out = field;
  while (out.labels.dim() < rank) {
    out.labels = out.labels.unsqueeze(0);
  }
  while (out.labels.dim() > rank) {
    out.labels = out.labels.squeeze(0);
  }
  return out;
}

}  // namespace rarefy::pruning
