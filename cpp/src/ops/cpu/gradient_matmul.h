// Matrix products of the backward pass.
#pragma once

#include <ATen/core/Tensor.h>

namespace rarefy::ops {

/// a [M, K] times the transpose of b [N, K]: [M, N]; both float32 or both bfloat16, any strides.
/// float32 goes to oneDNN where this LibTorch has it: on AMD processors MKL, which at::mm calls, reaches half its rate.
at::Tensor matmul_transposed(const at::Tensor& a, const at::Tensor& b);

}  // namespace rarefy::ops
