#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <optional>
#include <string>

namespace rarefy::ops {

/// Sums, means or largest values of rows that were looked up: [bags, width]. Also torch.ops.rarefy.reduce_bags, one operator so that
/// whoever reads a recording sees bags and not how torch is made to compute them.
///   rows                [n, width], floating point: one for each of the n indices, in their order
///   indices             int32 or int64: [bags, size], or [n] with offsets
///   offsets             [bags]: where each bag begins; with include_last_offset, n follows the last of them
///   per_sample_weights  in the shape of indices: what rows are multiplied with, for "sum" alone
///   mode                "sum", "mean" or "max"
///   padding_idx         an index whose rows are left out, and not counted by means; bags of nothing else are 0
/// Throws c10::ValueError for shapes that do not fit together and arguments that do not go together, c10::TypeError for types.
at::Tensor reduce_bags(const at::Tensor& rows, const at::Tensor& indices, const std::optional<at::Tensor>& offsets,
                       const std::optional<at::Tensor>& per_sample_weights, const std::string& mode,
                       bool include_last_offset, std::optional<int64_t> padding_idx);

}  // namespace rarefy::ops
