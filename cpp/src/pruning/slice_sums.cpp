#include "pruning/slice_sums.h"

#include <ATen/Functions.h>
#include <ATen/Parallel.h>
#include <c10/util/Exception.h>

#include <algorithm>
#include <array>
#include <cmath>

namespace rarefy::pruning {
namespace {

using Sums = std::vector<std::vector<double>>;

constexpr int64_t kRowsPerBlock = 64;      // rows whose column sums are kept in float32
constexpr int64_t kColumnsPerPart = 4096;  // columns whose row sums are kept in float32
constexpr int64_t kLanes = 16;
constexpr int64_t kSerial = 1 << 15;  // elements below which one thread is enough

at::Tensor terms(Term term, double p, const at::Tensor& weight, const at::Tensor& gradient) {
  switch (term) {
    case Term::power:
      return p == 2.0 ? weight.square() : p == 1.0 || std::isinf(p) ? weight.abs() : weight.abs().pow(p);
    case Term::product:
      return weight * gradient;
    case Term::absolute_product:
      return (weight * gradient).abs();
  }
  TORCH_INTERNAL_ASSERT(false, "unknown term");
}

/// Any type, layout and device, in float64.
Sums general(Term term, double p, const at::Tensor& weight, const at::Tensor& gradient,
             const std::vector<int64_t>& dims) {
  const auto values = terms(term, p, weight.to(at::kDouble), gradient.defined() ? gradient.to(at::kDouble) : gradient);
  Sums sums;
  for (const int64_t dim : dims) {
    if (values.numel() == 0) {
      sums.emplace_back(static_cast<size_t>(values.size(dim)), 0.0);
      continue;
    }
    const auto slices = values.movedim(dim, 0).reshape({values.size(dim), -1});
    sums.push_back(to_doubles(std::isinf(p) && term == Term::power ? slices.amax(1) : slices.sum(1)));
  }
  return sums;
}

struct Absolute {
  static float of(float w, float) { return std::abs(w); }
};
struct Square {
  static float of(float w, float) { return w * w; }
};
struct Product {
  static float of(float w, float g) { return w * g; }
};
struct AbsoluteProduct {
  static float of(float w, float g) { return std::abs(w * g); }
};

/// A matrix in memory, and another of the same layout.
struct Matrix {
  const float* w;
  const float* g;
  int64_t rows;
  int64_t columns;
};

/// Sums over one row and adds it to the columns.
template <typename Function>
double add_row(const float* w, const float* g, int64_t columns, float* column_sums) {
  double sum = 0;
  for (int64_t begin = 0; begin < columns; begin += kColumnsPerPart) {
    const int64_t end = std::min(begin + kColumnsPerPart, columns);
    std::array<float, kLanes> lanes{};
    int64_t i = begin;
    for (; i + kLanes <= end; i += kLanes) {
      for (int64_t lane = 0; lane < kLanes; ++lane) {
        const float value = Function::of(w[i + lane], g[i + lane]);
        lanes[static_cast<size_t>(lane)] += value;
        column_sums[i + lane] += value;
      }
    }
    for (; i < end; ++i) {
      const float value = Function::of(w[i], g[i]);
      lanes[0] += value;
      column_sums[i] += value;
    }
    for (const float lane : lanes) {
      sum += lane;
    }
  }
  return sum;
}

/// Row and column sums. Blocks of rows are fixed and added in order, whatever thread computes them.
template <typename Function>
std::pair<std::vector<double>, std::vector<double>> matrix_sums(const Matrix& matrix) {
  const int64_t blocks = (matrix.rows + kRowsPerBlock - 1) / kRowsPerBlock;
  std::vector<double> rows(static_cast<size_t>(matrix.rows));
  std::vector<float> partial(static_cast<size_t>(blocks * matrix.columns), 0.0F);
  const int64_t grain = std::max<int64_t>(1, kSerial / std::max<int64_t>(1, kRowsPerBlock * matrix.columns));
  at::parallel_for(0, blocks, grain, [&](int64_t first, int64_t last) {
    for (int64_t block = first; block < last; ++block) {
      const int64_t end = std::min((block + 1) * kRowsPerBlock, matrix.rows);
      for (int64_t row = block * kRowsPerBlock; row < end; ++row) {
        const int64_t offset = row * matrix.columns;
        rows[static_cast<size_t>(row)] = add_row<Function>(matrix.w + offset, matrix.g + offset, matrix.columns,
                                                           partial.data() + block * matrix.columns);
      }
    }
  });
  std::vector<double> columns(static_cast<size_t>(matrix.columns), 0.0);
  for (int64_t block = 0; block < blocks; ++block) {
    const float* own = partial.data() + block * matrix.columns;
    for (size_t column = 0; column < columns.size(); ++column) {
      columns[column] += own[column];
    }
  }
  return {std::move(rows), std::move(columns)};
}

bool is_dense(const at::Tensor& tensor) {
  return tensor.is_contiguous() || tensor.is_contiguous(at::MemoryFormat::ChannelsLast) ||
         tensor.is_contiguous(at::MemoryFormat::ChannelsLast3d);
}

/// Float32 weights on the CPU, by their first two dimensions.
bool is_plain(Term term, double p, const at::Tensor& weight, const at::Tensor& gradient,
              const std::vector<int64_t>& dims) {
  return weight.device().is_cpu() && weight.scalar_type() == at::kFloat && weight.dim() >= 2 && weight.numel() > 0 &&
         is_dense(weight) && std::all_of(dims.begin(), dims.end(), [](int64_t dim) { return dim < 2; }) &&
         (term != Term::power || p == 1.0 || p == 2.0) &&
         (!gradient.defined() || (gradient.device().is_cpu() && gradient.scalar_type() == at::kFloat));
}

Sums plain(Term term, double p, const at::Tensor& weight, const at::Tensor& gradient,
           const std::vector<int64_t>& dims) {
  const auto same =
      gradient.defined() && gradient.strides() != weight.strides() ? at::empty_like(weight).copy_(gradient) : gradient;
  const auto* w = weight.const_data_ptr<float>();
  const Matrix matrix{w, same.defined() ? same.const_data_ptr<float>() : w, weight.size(0),
                      weight.numel() / weight.size(0)};
  auto [rows, elements] = term == Term::product            ? matrix_sums<Product>(matrix)
                          : term == Term::absolute_product ? matrix_sums<AbsoluteProduct>(matrix)
                          : p == 1.0                       ? matrix_sums<Absolute>(matrix)
                                                           : matrix_sums<Square>(matrix);
  std::vector<double> columns(static_cast<size_t>(weight.size(1)), 0.0);
  const auto inner = elements.size() / columns.size();
  const bool is_channels_last = !weight.is_contiguous();
  for (size_t i = 0; i < elements.size(); ++i) {
    columns[is_channels_last ? i % columns.size() : i / inner] += elements[i];
  }
  Sums sums;
  for (const int64_t dim : dims) {
    sums.push_back(dim == 0 ? rows : columns);
  }
  return sums;
}

}  // namespace

Sums slice_sums(Term term, double p, const at::Tensor& weight, const at::Tensor& gradient,
                const std::vector<int64_t>& dims) {
  if (is_plain(term, p, weight, gradient, dims)) {
    auto sums = plain(term, p, weight, gradient, dims);
    const bool finite = std::all_of(sums.begin(), sums.end(), [](const auto& of_dim) {
      return std::all_of(of_dim.begin(), of_dim.end(), [](double sum) { return std::isfinite(sum); });
    });
    if (finite) {
      return sums;
    }
  }
  return general(term, p, weight, gradient, dims);
}

std::vector<double> to_doubles(const at::Tensor& tensor) {
  const auto values = tensor.to(at::kCPU, at::kDouble).contiguous();
  return {values.const_data_ptr<double>(), values.const_data_ptr<double>() + values.numel()};
}

at::Tensor to_tensor(const std::vector<double>& values) {
  return at::tensor(at::ArrayRef<double>(values), at::TensorOptions(at::kDouble));
}

}  // namespace rarefy::pruning
