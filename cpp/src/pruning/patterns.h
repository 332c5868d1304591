#pragma once

#include <string>

namespace rarefy::pruning {

/// Whether a pattern is a parameter's full name ("layer1.0.conv1.weight") or its module's ("layer1.0.conv1"); * stands
/// for any characters, dots too, and ? for one.
bool matches_parameter(const std::string& pattern, const std::string& name);

/// The same for a tensor or any module around it: "encoder" names everything inside of the encoder.
bool matches_tree(const std::string& pattern, const std::string& name);

}  // namespace rarefy::pruning
