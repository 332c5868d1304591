#include "pruning/slice_sums.h"

#include <ATen/Functions.h>

#include <cmath>

namespace rarefy::pruning {
namespace {

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

}  // namespace

std::vector<std::vector<double>> slice_sums(Term term, double p, const at::Tensor& weight, const at::Tensor& gradient,
                                            const std::vector<int64_t>& dims) {
  const auto values = terms(term, p, weight.to(at::kDouble), gradient.defined() ? gradient.to(at::kDouble) : gradient);
  std::vector<std::vector<double>> sums;
  for (const int64_t dim : dims) {
    const auto slices = values.movedim(dim, 0).reshape({values.size(dim), -1});
    sums.push_back(to_doubles(std::isinf(p) && term == Term::power ? slices.amax(1) : slices.sum(1)));
  }
  return sums;
}

std::vector<double> to_doubles(const at::Tensor& tensor) {
  const auto values = tensor.to(at::kCPU, at::kDouble).contiguous();
  return {values.const_data_ptr<double>(), values.const_data_ptr<double>() + values.numel()};
}

at::Tensor to_tensor(const std::vector<double>& values) {
  return at::tensor(at::ArrayRef<double>(values), at::TensorOptions(at::kDouble));
}

}  // namespace rarefy::pruning
