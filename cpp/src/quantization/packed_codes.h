// How the elements of a format are stored, for those who read codes.
#pragma once

#include <c10/core/ScalarType.h>
#include <rarefy/quantization/scheme.h>

#include <optional>
#include <vector>

namespace rarefy::quantization {

/// torch's type with the same bits, where there is one: data then lies in the tensor's shape.
std::optional<c10::ScalarType> stored_type(const Scheme& scheme);

/// The numbers of the codes, before they are scaled, of formats without integers and codebooks.
std::vector<float> code_table(const Scheme& scheme);

}  // namespace rarefy::quantization
