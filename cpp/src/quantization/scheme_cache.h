// Schemes of the texts that operators take.
#pragma once

#include <rarefy/quantization/scheme.h>

#include <string>

namespace rarefy::quantization {

/// Scheme::from_json(json); each text is read once.
const Scheme& scheme_of(const std::string& json);

}  // namespace rarefy::quantization
