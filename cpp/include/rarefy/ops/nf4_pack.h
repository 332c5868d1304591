#pragma once

#include <ATen/core/Tensor.h>
#include <rarefy/export.h>

#include <cstdint>

// Weights in 4-bit NormalFloat, as they are stored (Dettmers et al., 2023, arXiv:2305.14314). Also torch.ops.rarefy.pack_nf4 and
// unpack_nf4.
namespace rarefy::ops {

/// A weight of shape [rows, columns] in NF4 with double quantization: about 4.13 bits per value for blocks of 64 and 256.
struct PackedNf4 {
  at::Tensor codes;        // uint8 [rows, ceil(columns / 2)]: two codes of 4 bits per byte, the first in the low bits
  at::Tensor scale_codes;  // int8 [rows * ceil(columns / block)]: (scale - mean) / step, to nearest even
  at::Tensor scale_steps;  // float32 [ceil(number of scales / scale_block)]
  at::Tensor scale_mean;   // float32 [1]
};

/// The scale of a block, which lies in one row, is its largest magnitude (1 for a block of zeros), kept in 8 bits: the mean of
/// all scales is subtracted and the rest rounded to [-127, 127] with one step for each scale_block scales. A value becomes the
/// nearest of the 16 of NormalFloat times the scale that comes back.
/// Throws c10::ValueError for a weight that has not two dimensions with values, is not finite, or blocks below 1;
/// c10::TypeError unless it is floating point.
RAREFY_API PackedNf4 pack_nf4(const at::Tensor& weight, int64_t block = 64, int64_t scale_block = 256);

/// The values: [rows, columns] of the type. Throws c10::ValueError for shapes that do not fit together.
RAREFY_API at::Tensor unpack_nf4(const PackedNf4& packed, int64_t columns, int64_t block = 64,
                                 int64_t scale_block = 256, at::ScalarType dtype = at::kFloat);

}  // namespace rarefy::ops
