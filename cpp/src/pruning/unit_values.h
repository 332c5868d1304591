#pragma once

#include <rarefy/pruning/importance.h>

#include <vector>

namespace rarefy::pruning {

using Values = std::vector<double>;

bool all_finite(const Values& values);

/// Of each group, for each member that takes part: a value per unit. Empty where the criterion says nothing. Checks the
/// parameters; see importance().
std::vector<std::vector<Values>> member_values(const Structure& structure, const ParameterLookup& lookup,
                                               const Criterion& criterion, const Statistics& statistics);

}  // namespace rarefy::pruning
