#include <ATen/ops/cat.h>
#include <rarefy/nn/add.h>
#include <rarefy/nn/cat.h>
#include <rarefy/nn/mul.h>

#include <ostream>

namespace rarefy::nn {

void AddImpl::pretty_print(std::ostream& stream) const { stream << "rarefy::nn::Add()"; }

torch::Tensor AddImpl::forward(const torch::Tensor& a, const torch::Tensor& b) {
  return finished(quantized("input0", a) + quantized("input1", b));
}

void MulImpl::pretty_print(std::ostream& stream) const { stream << "rarefy::nn::Mul()"; }

torch::Tensor MulImpl::forward(const torch::Tensor& a, const torch::Tensor& b) {
  return finished(quantized("input0", a) * quantized("input1", b));
}

void CatImpl::pretty_print(std::ostream& stream) const { stream << "rarefy::nn::Cat(dim=" << dim_ << ")"; }

torch::Tensor CatImpl::forward(const std::vector<torch::Tensor>& tensors) {
  // Rounding what was joined is joining what was rounded, in one pass and with the range of all.
  return quantized("input", at::cat(tensors, dim_));
}

}  // namespace rarefy::nn
