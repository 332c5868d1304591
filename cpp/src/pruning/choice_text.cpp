#include <fmt/format.h>
#include <rarefy/pruning/choice.h>

#include <algorithm>

#include "html.h"

namespace rarefy::pruning {
namespace {

std::string title(const Choice& choice) {
  const auto asked = choice.target.has_value()
                         ? std::visit([](const auto& chosen) { return chosen.to_string(); }, *choice.target)
                         : std::string("widths");
  return fmt::format("{} asked, {:.4f} removed (channels {:.4f}, parameters {:.4f}, MACs {:.4f})", asked,
                     choice.achieved(), choice.channels_removed(), choice.parameters_removed(), choice.macs_removed());
}

}  // namespace

std::string Counts::to_string() const {
  return fmt::format("Counts(channels={}, parameters={}, macs={})", channels, parameters, macs);
}

std::string GroupOutcome::to_string() const {
  return fmt::format("GroupOutcome(name='{}', units={}, removed={}, reason='{}')", name, units, removed, reason);
}

std::string Choice::to_string() const {
  size_t width = 5;
  for (const auto& group : groups) {
    width = std::max(width, group.name.size());
  }
  auto out = fmt::format("Choice: {}\n{:<{}}  {:>7}  {:>7}\n", title(*this), "group", width, "kept", "of");
  for (const auto& group : groups) {
    out += fmt::format("{:<{}}  {:>7}  {:>7}{}{}\n", group.name, width, group.units - group.removed, group.units,
                       group.reason.empty() ? "" : "  ", group.reason);
  }
  return out;
}

std::string Choice::to_html() const {
  auto out =
      fmt::format("<p><b>Choice</b>: {}</p>\n<table>\n<tr><th>group</th><th>kept</th><th>of</th><th>reason</th></tr>\n",
                  escaped(title(*this)));
  for (const auto& group : groups) {
    out += fmt::format("<tr><td>{}</td><td>{}</td><td>{}</td><td>{}</td></tr>\n", escaped(group.name),
                       group.units - group.removed, group.units, escaped(group.reason));
  }
  return out + "</table>";
}

}  // namespace rarefy::pruning
