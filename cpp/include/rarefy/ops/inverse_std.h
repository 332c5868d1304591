#pragma once

#include <ATen/core/Tensor.h>
#include <rarefy/export.h>

namespace rarefy::ops {

/// 1 / sqrt(running_var + eps), elementwise: what folds a batch normalization into the convolution before it. Not
/// differentiable, as running statistics are not. Also torch.ops.rarefy.inverse_std.
///
/// An operator of its own for the sake of torch.compile: from elementary operators, its partitioner recomputes the factor
/// in the backward pass, from statistics that the forward pass has moved on by then.
RAREFY_API at::Tensor inverse_std(const at::Tensor& running_var, double eps);

}  // namespace rarefy::ops
