// A transposed convolution as ordinary ones: which taps reach which output positions.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <vector>

namespace rarefy::ops {

/// The output positions begin, begin + stride, ... of one dimension. Position begin + j * stride is a sum over u of
/// input[j - before + u * dilation] * kernel[first + (count - 1 - u) * step].
struct Phase {
  int64_t begin = 0, length = 0;                // of the output
  int64_t first = 0, step = 1, count = 0;       // of the kernel; no taps: only the bias is there
  int64_t before = 0, after = 0, dilation = 1;  // of the input: zeros around it, or what is left out where negative
};

/// The phases of one dimension, one for each residue of the stride that the output has.
/// length: that of every phase, 0 for as many positions as there are.
std::vector<Phase> phases_of(int64_t in, int64_t out, int64_t kernel, int64_t stride, int64_t padding, int64_t dilation,
                             int64_t length = 0);

/// The kernel of one ordinary convolution, [out, in / groups, taps...], of weight [in, out / groups, kernel...].
at::Tensor phase_weight(const at::Tensor& weight, int64_t groups, const std::vector<Phase>& phase);

}  // namespace rarefy::ops
