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

/// For each of `dims`: the sum over all elements of each slice along it. p = infinity gives the maximum instead of the
/// sum. Not finite where an element is not. Float32 weights on the CPU with p = 1 or 2 and dims 0 and 1 are read once,
/// in float32 over at most 64 rows and in float64 from there, independent of the number of threads; all else is
/// computed in float64.
std::vector<std::vector<double>> slice_sums(Term term, double p, const at::Tensor& weight, const at::Tensor& gradient,
                                            const std::vector<int64_t>& dims);

/// Copies a 1-D tensor of any type and device.
std::vector<double> to_doubles(const at::Tensor& tensor);
at::Tensor to_tensor(const std::vector<double>& values);

}  // namespace rarefy::pruning
