// The k smallest of many numbers, by selection. Of equal ones the earlier is taken.
#pragma once

#include <cstdint>

namespace rarefy::pruning {

/// keep[i] = 0 for the k smallest scores and 1 for the others; scores are not negative and not NaN. float32 above a few
/// thousand by two passes that count bits, else by partition of a copy.
void keep_all_but_smallest(const float* scores, int64_t n, int64_t k, uint8_t* keep);
void keep_all_but_smallest(const double* scores, int64_t n, int64_t k, uint8_t* keep);

}  // namespace rarefy::pruning
