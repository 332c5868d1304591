#include <c10/util/Exception.h>
#include <fmt/format.h>
#include <rarefy/pruning/structure_text.h>

#include <algorithm>

#include "html.h"

namespace rarefy::pruning {
namespace {

std::string title(const Structure& structure) {
  int64_t units = 0;
  for (const auto& group : structure.groups) {
    units += group.units;
  }
  return fmt::format("{} groups with {} units, {} pinned dimensions", structure.groups.size(), units,
                     structure.pinned.size());
}

}  // namespace

const char* name(Role role) { return role == Role::output ? "output" : role == Role::input ? "input" : "affine"; }

Role parse_role(const std::string& text) {
  for (const auto role : {Role::output, Role::input, Role::affine}) {
    if (text == name(role)) {
      return role;
    }
  }
  TORCH_CHECK_VALUE(false, "[parse_role] must be one of output, input, affine, got '", text, "'");
}

std::string to_string(const Member& member) {
  const auto own =
      std::count_if(member.unit_of_index.begin(), member.unit_of_index.end(), [](auto unit) { return unit >= 0; });
  const auto all = static_cast<int64_t>(member.unit_of_index.size());
  return fmt::format("{}[{}] {}, {} slices", member.tensor, member.dim, name(member.role),
                     own == all ? std::to_string(all) : fmt::format("{} of {}", own, all));
}

std::string to_string(const Group& group) {
  auto out = fmt::format("{}: {} units\n", group.name, group.units);
  for (const auto& member : group.members) {
    out += fmt::format("  {}\n", to_string(member));
  }
  return out;
}

std::string to_string(const Pinned& pinned) {
  return fmt::format("{}[{}], {} slices: {}", pinned.tensor, pinned.dim, pinned.size, pinned.reason);
}

std::string to_string(const Cost& cost) {
  auto out = fmt::format("Cost: {}", cost.factor);
  for (const auto& axis : cost.axes) {
    out += fmt::format(" x {}", axis.size());
  }
  return out + fmt::format(" (node {})", cost.node);
}

std::string Structure::to_string() const {
  auto out = fmt::format("Structure: {}\n", title(*this));
  for (const auto& group : groups) {
    out += pruning::to_string(group);
  }
  if (!pinned.empty()) {
    out += "pinned:\n";
    for (const auto& one : pinned) {
      out += fmt::format("  {}\n", pruning::to_string(one));
    }
  }
  return out;
}

std::string to_html(const Structure& structure) {
  auto out =
      fmt::format("<p><b>Structure</b>: {}</p>\n<table>\n<tr><th>group</th><th>units</th><th>members</th></tr>\n",
                  title(structure));
  for (const auto& group : structure.groups) {
    std::string members;
    for (const auto& member : group.members) {
      members += (members.empty() ? "" : "<br>") + escaped(to_string(member));
    }
    out += fmt::format("<tr><td>{}</td><td>{}</td><td>{}</td></tr>\n", escaped(group.name), group.units, members);
  }
  for (const auto& one : structure.pinned) {
    out += fmt::format("<tr><td>pinned</td><td></td><td>{}</td></tr>\n", escaped(to_string(one)));
  }
  return out + "</table>";
}

}  // namespace rarefy::pruning
