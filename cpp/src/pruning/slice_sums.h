#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <vector>

namespace rarefy::pruning {

/// What is summed over a slice of a weight w with gradient g.
enum class Term {
  power,             // |w|^p
  product,           // w g
  absolute_product,  // |w g|
};

/// For each of `dims`: the sum over all elements of each slice along it, in one pass over the tensor. p = infinity
/// gives the maximum instead of the sum. The result is not finite where an element is not; it may also be so for finite
/// elements that overflow float32. It does not depend on the number of threads.
std::vector<std::vector<double>> slice_sums(Term term, double p, const at::Tensor& weight, const at::Tensor& gradient,
                                            const std::vector<int64_t>& dims);

/// Copies a 1-D tensor of any type and device.
std::vector<double> to_doubles(const at::Tensor& tensor);
at::Tensor to_tensor(const std::vector<double>& values);

}  // namespace rarefy::pruning
