#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <rarefy/ops/sparse_linear.h>
#include <torch/library.h>

#include <cstring>
#include <limits>
#include <vector>

TORCH_LIBRARY_FRAGMENT(rarefy, m) {
  m.def("sparse_linear(Tensor x, Tensor values, Tensor columns, Tensor row_offsets, Tensor? bias=None) -> Tensor");
}

namespace rarefy::ops {
namespace {

using Signature = at::Tensor(const at::Tensor&, const at::Tensor&, const at::Tensor&, const at::Tensor&,
                             const std::optional<at::Tensor>&);

int64_t height_of(const SparseWeight& weight) { return weight.values.dim() == 3 ? weight.values.size(1) : 1; }
int64_t width_of(const SparseWeight& weight) { return weight.values.dim() == 3 ? weight.values.size(2) : 1; }

/// Word is the unsigned type of an element's width; elements that are +0 or -0 are not kept.
template <typename Word>
SparseWeight sparse_of(const at::Tensor& dense, int64_t height, int64_t width) {
  constexpr Word kMagnitude = static_cast<Word>(~(Word{1} << (8 * sizeof(Word) - 1)));
  const int64_t out = dense.size(0), in = dense.size(1);
  const auto* words = static_cast<const Word*>(dense.const_data_ptr());
  const auto row = [&](int64_t r, int64_t column) { return words + r * in + column * width; };
  const auto is_kept = [&](int64_t block_row, int64_t column) {
    for (int64_t r = block_row * height; r < (block_row + 1) * height; ++r) {
      const Word* from = row(r, column);
      for (int64_t k = 0; k < width; ++k) {
        if ((from[k] & kMagnitude) != 0) {
          return true;
        }
      }
    }
    return false;
  };
  const int64_t rows = out / height, columns_per_row = in / width;
  std::vector<int64_t> offsets{0};
  std::vector<int32_t> columns;
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t c = 0; c < columns_per_row; ++c) {
      if (is_kept(r, c)) {
        columns.push_back(static_cast<int32_t>(c));
      }
    }
    offsets.push_back(static_cast<int64_t>(columns.size()));
  }
  const auto count = static_cast<int64_t>(columns.size());
  const auto options = at::TensorOptions();
  SparseWeight weight;
  weight.values =
      height * width == 1 ? at::empty({count}, dense.options()) : at::empty({count, height, width}, dense.options());
  weight.row_offsets = at::empty({rows + 1}, options.dtype(at::kLong));
  std::memcpy(weight.row_offsets.mutable_data_ptr(), offsets.data(), offsets.size() * sizeof(int64_t));
  auto* values = static_cast<Word*>(weight.values.mutable_data_ptr());
  for (int64_t r = 0; r < rows; ++r) {
    for (auto i = static_cast<size_t>(offsets[static_cast<size_t>(r)]);
         i < static_cast<size_t>(offsets[static_cast<size_t>(r) + 1]); ++i) {
      for (int64_t h = 0; h < height; ++h, values += width) {
        std::memcpy(values, row(r * height + h, columns[i]), static_cast<size_t>(width) * sizeof(Word));
      }
    }
  }
  weight.columns = at::empty({count}, options.dtype(at::kInt));
  std::memcpy(weight.columns.mutable_data_ptr(), columns.data(), columns.size() * sizeof(int32_t));
  if (columns_per_row <= int64_t{std::numeric_limits<int16_t>::max()} + 1) {
    weight.columns = weight.columns.to(at::kShort);
  }
  return weight;
}

}  // namespace

at::Tensor sparse_linear(const at::Tensor& x, const SparseWeight& weight, const std::optional<at::Tensor>& bias) {
  static const auto op = c10::Dispatcher::singleton().findSchemaOrThrow("rarefy::sparse_linear", "").typed<Signature>();
  return op.call(x, weight.values, weight.columns, weight.row_offsets, bias);
}

SparseWeight to_sparse_weight(const at::Tensor& weight, int64_t height, int64_t width) {
  const auto type = weight.scalar_type();
  TORCH_CHECK_TYPE(type == at::kFloat || type == at::kBFloat16,
                   "[to_sparse_weight] weight must be float32 or bfloat16, got ", type);
  TORCH_CHECK_VALUE(weight.dim() == 2, "[to_sparse_weight] weight must have shape [out, in], got ", weight.sizes());
  TORCH_CHECK_VALUE(height > 0 && width > 0 && weight.size(0) % height == 0 && weight.size(1) % width == 0,
                    "[to_sparse_weight] the sizes of the weight must be multiples of the block's, got ", weight.sizes(),
                    " and blocks of ", height, " x ", width);
  TORCH_CHECK_VALUE(weight.size(1) <= std::numeric_limits<int32_t>::max(),
                    "[to_sparse_weight] in must be below 2^31, got ", weight.size(1));
  const auto dense = weight.detach().to(at::kCPU).contiguous();
  return type == at::kFloat ? sparse_of<uint32_t>(dense, height, width) : sparse_of<uint16_t>(dense, height, width);
}

at::Tensor to_dense_weight(const SparseWeight& weight, int64_t in_features) {
  const int64_t height = height_of(weight), width = width_of(weight), rows = weight.row_offsets.numel() - 1;
  TORCH_CHECK_VALUE(in_features % width == 0, "[to_dense_weight] in_features must be a multiple of ", width, ", got ",
                    in_features);
  auto dense = at::zeros({rows * height, in_features}, weight.values.options());
  const auto values = weight.values.contiguous();
  const auto columns = weight.columns.to(at::kInt).contiguous();
  const auto offsets = weight.row_offsets.contiguous();
  const auto* column = columns.const_data_ptr<int32_t>();
  const auto* offset = offsets.const_data_ptr<int64_t>();
  const auto element = static_cast<int64_t>(values.element_size());
  const auto* from = static_cast<const char*>(values.const_data_ptr());
  auto* into = static_cast<char*>(dense.mutable_data_ptr());
  TORCH_CHECK_VALUE(offset[0] == 0 && offset[rows] == columns.numel(),
                    "[to_dense_weight] row_offsets must go from 0 to ", columns.numel(), ", got ", offset[0], " to ",
                    offset[rows]);
  for (int64_t r = 0; r < rows; ++r) {
    TORCH_CHECK_VALUE(offset[r] <= offset[r + 1], "[to_dense_weight] row_offsets must ascend, but do not at row ", r);
    for (int64_t i = offset[r]; i < offset[r + 1]; ++i) {
      TORCH_CHECK_VALUE(column[i] >= 0 && column[i] < in_features / width, "[to_dense_weight] columns must be in [0, ",
                        in_features / width, "), got ", column[i]);
      for (int64_t h = 0; h < height; ++h) {
        std::memcpy(into + ((r * height + h) * in_features + column[i] * width) * element,
                    from + (i * height + h) * width * element, static_cast<size_t>(width * element));
      }
    }
  }
  return dense;
}

}  // namespace rarefy::ops
