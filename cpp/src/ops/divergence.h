// What distillation_loss measures and how it combines rows, for kernels too: no torch and no standard library here.
#pragma once

namespace rarefy {

/// The divergences of rarefy/ops/distillation_loss.h. The last three take a skew that is inside (0, 1).
enum class Divergence { kl, reverse_kl, total_variation, jensen_shannon, skewed_kl, skewed_reverse_kl };

enum class Reduction { mean, sum, none };

}  // namespace rarefy
