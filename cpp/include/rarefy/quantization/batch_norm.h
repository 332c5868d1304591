#pragma once

#include <rarefy/export.h>
#include <torch/nn/module.h>

#include <cstdint>
#include <functional>

namespace rarefy::quantization {

/// Fixes the statistics of the batch normalizations that are folded into convolutions, while training goes on: a frozen
/// one normalizes with its running statistics, as in evaluation, and does not move them; gamma and beta still train.
/// `frozen` = false lets the statistics follow the data again.
/// Throws c10::ValueError when the model has no folded batch normalization.
RAREFY_API void freeze_batch_norm(torch::nn::Module& model, bool frozen = true);

/// Computes the running statistics of every batch normalization anew: the plain average over batches. `run(i)` feeds the
/// model with batch i, for i in [0, batches). Every batch normalization (frozen ones too) normalizes with its batch's
/// statistics, everything else is in evaluation mode; folded weights stay those of the old statistics until the end.
/// Throws c10::ValueError for batches < 1, a model without batch normalization, or one that no batch reached (they are
/// named), and passes on what `run` throws; then everything is as it was.
RAREFY_API void reestimate_batch_norm(torch::nn::Module& model, int64_t batches,
                                      const std::function<void(int64_t)>& run);

}  // namespace rarefy::quantization
