#pragma once

#include <rarefy/quantization/scheme.h>

#include <string>

namespace rarefy::quantization {

/// The scheme of a JSON text; each text is read once. For operators, which take schemes so.
const Scheme& scheme_of(const std::string& json);

}  // namespace rarefy::quantization
