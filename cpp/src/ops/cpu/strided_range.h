// Ranges of a strided tensor in logical order, for kernels whose other operand lies in that order: packed masks.
#pragma once

#include <ATen/core/Tensor.h>

#include <algorithm>
#include <cstdint>
#include <vector>

namespace rarefy::ops {

class StridedRange {
 public:
  /// Of a tensor that has elements and is not contiguous.
  explicit StridedRange(const at::Tensor& x) {
    // Neighbouring dimensions that are walked with one stride are one dimension.
    for (int64_t d = 0; d < x.dim(); ++d) {
      if (x.size(d) == 1) {
        continue;
      }
      if (!sizes_.empty() && strides_.back() == x.size(d) * x.stride(d)) {
        sizes_.back() *= x.size(d);
        strides_.back() = x.stride(d);
      } else {
        sizes_.push_back(x.size(d));
        strides_.push_back(x.stride(d));
      }
    }
  }

  /// Calls body(pointer, i) for the elements i of [begin, end).
  template <typename T, typename Body>
  void walk(T* values, int64_t begin, int64_t end, const Body& body) const {
    const size_t dims = sizes_.size();
    std::vector<int64_t> index(dims);
    int64_t offset = 0;
    for (size_t d = dims, rest = static_cast<size_t>(begin); d-- > 0; rest /= static_cast<size_t>(sizes_[d])) {
      index[d] = static_cast<int64_t>(rest % static_cast<size_t>(sizes_[d]));
      offset += index[d] * strides_[d];
    }
    const int64_t run = sizes_[dims - 1], step = strides_[dims - 1];
    for (int64_t i = begin; i < end;) {
      const int64_t run_end = std::min(end, i + run - index[dims - 1]);
      for (T* p = values + offset; i < run_end; ++i, p += step) {
        body(p, i);
      }
      offset -= index[dims - 1] * step;
      index[dims - 1] = 0;
      for (size_t d = dims - 1; d-- > 0;) {
        offset += strides_[d];
        if (++index[d] < sizes_[d]) {
          break;
        }
        offset -= sizes_[d] * strides_[d];
        index[d] = 0;
      }
    }
  }

 private:
  std::vector<int64_t> sizes_, strides_;
};

}  // namespace rarefy::ops
