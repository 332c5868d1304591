#include <ATen/ops/cat.h>
#include <rarefy/nn/add.h>
#include <rarefy/nn/cat.h>
#include <rarefy/nn/mul.h>
#include <rarefy/ops/quantized.h>

#include <algorithm>
#include <ostream>

namespace rarefy::nn {

void AddImpl::pretty_print(std::ostream& stream) const { stream << "rarefy::nn::Add()"; }

torch::Tensor AddImpl::forward(const torch::Tensor& a, const torch::Tensor& b) {
  if (mode_ == Mode::converted && quant->has_bytes("input0") && quant->has_bytes("input1")) {
    return with_output_grid(
        ops::quantized_add(a, b, quant->grid("input0"), quant->grid("input1"), relu(), quant->output_grid()));
  }
  return finished(quantized("input0", a) + quantized("input1", b));
}

void MulImpl::pretty_print(std::ostream& stream) const { stream << "rarefy::nn::Mul()"; }

torch::Tensor MulImpl::forward(const torch::Tensor& a, const torch::Tensor& b) {
  return finished(quantized("input0", a) * quantized("input1", b));
}

void CatImpl::pretty_print(std::ostream& stream) const { stream << "rarefy::nn::Cat(dim=" << dim_ << ")"; }

torch::Tensor CatImpl::forward(const std::vector<torch::Tensor>& tensors) {
  if (mode_ == Mode::converted && quant->has_bytes("input")) {
    const auto grid = quant->grid("input");
    auto given = tensors;
    const auto is_bytes = [](const torch::Tensor& x) { return x.scalar_type() == torch::kUInt8; };
    if (std::any_of(given.begin(), given.end(), is_bytes)) {
      for (auto& x : given) {
        x = is_bytes(x) ? x : ops::requantize(x, grid, grid);
      }
    }
    return with_output_grid(ops::requantize(at::cat(given, dim_), grid, quant->output_grid()));
  }
  // Rounding what was joined is joining what was rounded, in one pass and with the range of all.
  return quantized("input", at::cat(tensors, dim_));
}

}  // namespace rarefy::nn
