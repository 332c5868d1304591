#pragma once

#include <rarefy/export.h>
#include <rarefy/pruning/structure.h>

#include <string>

// Structures as text: one line per part, a table for notebooks. Structure::to_string() gives the whole.
namespace rarefy::pruning {

/// "output", "input" or "affine". Throws c10::ValueError for anything else.
RAREFY_API Role parse_role(const std::string& name);

RAREFY_API std::string to_string(const Member& member);
RAREFY_API std::string to_string(const Group& group);
RAREFY_API std::string to_string(const Pinned& pinned);
RAREFY_API std::string to_string(const Cost& cost);

RAREFY_API std::string to_html(const Structure& structure);

}  // namespace rarefy::pruning
