#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
#include <atomic>
#include <cstring>
#include <vector>

#include "ops/cpu/sparse_linear_simd.h"
#include "ops/sparse_linear_checks.h"

#if !defined(INTRA_OP_PARALLEL)
#error "at::parallel_for is a template in torch's header: without -fopenmp here it runs on one thread, silently"
#endif

namespace rarefy::ops {
namespace {

constexpr int64_t kWork = 32768;     // products below which a second thread does not pay
constexpr int64_t kBufferRows = 64;  // rows whose sums are collected before they are written
constexpr const char* kName = "[sparse_linear] ";

void check_offsets(const at::Tensor& offsets, int64_t count) {
  const auto* offset = offsets.const_data_ptr<int64_t>();
  const int64_t rows = offsets.numel() - 1;
  bool ascends = offset[0] == 0 && offset[rows] == count;
  for (int64_t r = 0; r < rows; ++r) {
    ascends = ascends && offset[r] <= offset[r + 1];
  }
  TORCH_CHECK_VALUE(ascends, kName, "row_offsets must ascend from 0 to the number of columns, ", count);
}

/// Rows of blocks that one thread takes at least.
int64_t grain_of(int64_t rows, int64_t work) { return std::max<int64_t>(1, rows * kWork / std::max<int64_t>(work, 1)); }

class Product {
 public:
  Product(const cpu::SparseMatrix& matrix, int64_t rows, int64_t count, const at::Tensor& x, const float* bias,
          const at::Tensor& y)
      : matrix_(matrix),
        rows_(rows),
        work_(count * matrix.height * matrix.width),
        x_(x),
        samples_(x.size(0)),
        in_(x.size(1)),
        out_(y.size(1)),
        bias_(bias),
        y_(y) {}

  /// False when a column is not there.
  bool run() {
    if (samples_ == 1 && cpu::has_vector_kernel(matrix_.height, matrix_.width)) {
      one_sample();
    } else {
      many_samples();
    }
    return valid_;
  }

 private:
  void one_sample() {
    const auto x = x_.to(at::kFloat);
    const auto* from = x.const_data_ptr<float>();
    std::vector<float> scratch(
        static_cast<size_t>(cpu::vector_scratch(matrix_.height, matrix_.width, matrix_.column_count)));
    if (!scratch.empty()) {
      RAREFY_ISA_CALL(sparse_expand, matrix_, from, scratch.data());
    }
    std::vector<float> sums(static_cast<size_t>(out_));
    at::parallel_for(0, rows_, grain_of(rows_, work_), [&](int64_t begin, int64_t end) {
      if (!RAREFY_ISA_CALL(sparse_vector, matrix_, from, scratch.data(), sums.data(), begin, end)) {
        valid_ = false;
      }
    });
    RAREFY_ISA_CALL(sparse_unpack, matrix_.type, sums.data(), 1, out_, 1, bias_, y_.data_ptr(), out_, 0);
  }

  struct Tile {
    int64_t first, samples;
    int lanes;
    float* values;
  };

  std::vector<Tile> tiles() {
    std::vector<Tile> out;
    size_t size = 0;
    for (int64_t first = 0; first < samples_; first += cpu::kTileMost) {
      const int64_t samples = std::min<int64_t>(cpu::kTileMost, samples_ - first);
      const auto lanes = static_cast<int>((samples + cpu::kTileStep - 1) / cpu::kTileStep * cpu::kTileStep);
      out.push_back({first, samples, lanes, nullptr});
      size += static_cast<size_t>(lanes) * static_cast<size_t>(in_);
    }
    packed_ = at::empty({static_cast<int64_t>(size)}, at::TensorOptions().dtype(at::kFloat));
    auto* next = packed_.mutable_data_ptr<float>();
    for (auto& tile : out) {
      tile.values = next;
      next += tile.lanes * in_;
    }
    return out;
  }

  void many_samples() {
    const auto all = tiles();
    const auto* from = static_cast<const char*>(x_.const_data_ptr());
    at::parallel_for(
        0, in_, std::max<int64_t>(1, kWork / std::max<int64_t>(samples_, 1)), [&](int64_t begin, int64_t end) {
          for (const auto& tile : all) {
            const auto* samples = from + tile.first * in_ * static_cast<int64_t>(x_.element_size());
            RAREFY_ISA_CALL(sparse_pack, matrix_.type, samples, tile.samples, in_, tile.values, tile.lanes, begin, end);
          }
        });
    at::parallel_for(0, rows_, grain_of(rows_, work_ * samples_), [&](int64_t begin, int64_t end) {
      const int64_t at_once = std::max<int64_t>(1, kBufferRows / matrix_.height);
      std::vector<float> sums(static_cast<size_t>(at_once * matrix_.height * cpu::kTileMost));
      for (const auto& tile : all) {
        auto* into = static_cast<char*>(y_.data_ptr()) + tile.first * out_ * static_cast<int64_t>(y_.element_size());
        for (int64_t r = begin; r < end; r += at_once) {
          const int64_t last = std::min(end, r + at_once);
          if (!RAREFY_ISA_CALL(sparse_tile, matrix_, tile.values, tile.lanes, sums.data(), r, last)) {
            valid_ = false;
            return;
          }
          RAREFY_ISA_CALL(sparse_unpack, matrix_.type, sums.data(), tile.lanes, (last - r) * matrix_.height,
                          tile.samples, bias_, into, out_, r * matrix_.height);
        }
      }
    });
  }

  cpu::SparseMatrix matrix_;
  int64_t rows_, work_;
  at::Tensor x_;
  int64_t samples_, in_, out_;
  const float* bias_;
  at::Tensor y_, packed_;
  std::atomic<bool> valid_{true};
};

at::Tensor sparse_linear_cpu(const at::Tensor& x, const at::Tensor& values, const at::Tensor& columns,
                             const at::Tensor& row_offsets, const std::optional<at::Tensor>& bias) {
  const int64_t out = check_sparse_linear(x, values, columns, row_offsets, bias).expect_int();
  const auto packed = values.contiguous(), of_columns = columns.contiguous(), offsets = row_offsets.contiguous();
  check_offsets(offsets, of_columns.numel());
  const bool blocks = values.dim() == 3;
  const int64_t height = blocks ? values.size(1) : 1, width = blocks ? values.size(2) : 1, in = x.size(-1);
  const cpu::SparseMatrix matrix{values.scalar_type() == at::kFloat ? cpu::FloatType::f32 : cpu::FloatType::bf16,
                                 packed.const_data_ptr(),
                                 of_columns.const_data_ptr(),
                                 columns.scalar_type() == at::kInt,
                                 offsets.const_data_ptr<int64_t>(),
                                 height,
                                 width,
                                 in / width};
  auto sizes = x.sizes().vec();
  sizes.back() = out;
  auto y = at::empty(sizes, x.options());
  const int64_t samples = in == 0 ? (out == 0 ? 0 : y.numel() / out) : x.numel() / in;
  if (samples == 0 || out == 0) {
    return y;
  }
  const auto of_bias = bias.has_value() ? bias->to(at::kFloat).contiguous() : at::Tensor();
  Product product(matrix, offsets.numel() - 1, of_columns.numel(), x.contiguous().view({samples, in}),
                  bias.has_value() ? of_bias.const_data_ptr<float>() : nullptr, y.view({samples, out}));
  TORCH_CHECK_VALUE(product.run(), kName, "columns must be in [0, ", in / width, ") for an input of ", in,
                    " features, but are not");
  return y;
}

}  // namespace

TORCH_LIBRARY_IMPL(rarefy, CPU, m) { m.impl("sparse_linear", &sparse_linear_cpu); }

}  // namespace rarefy::ops
