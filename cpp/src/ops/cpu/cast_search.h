// The scales with which casts to a minifloat cost least, on the CPU.
#pragma once

#include <ATen/core/Tensor.h>

#include "ops/minifloat.h"

namespace rarefy::ops {

/// For each row of x [rows, n] the index of the first scale, among those of its row of `scales` [rows, k], with the least sum of
/// weights * (x - cast(x))^2: the terms in float32, their sum in float64, the same for any number of threads. -1 where none is
/// below the row's `cost`, float64 [rows], which is lowered to the least found. Everything lies on the CPU; x, `scales` and
/// `weights`, which may be undefined (1), are float32. Scales are finite and positive.
at::Tensor cheapest_casts(const at::Tensor& x, const at::Tensor& weights, const at::Tensor& scales,
                          const MinifloatShape& shape, at::Tensor& cost);

}  // namespace rarefy::ops
