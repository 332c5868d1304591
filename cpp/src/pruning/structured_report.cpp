#include <fmt/format.h>
#include <rarefy/pruning/structured_report.h>

#include <algorithm>
#include <map>

#include "html.h"

namespace rarefy::pruning {
namespace {

std::string percent(double before, double after) {
  return before > 0 ? fmt::format("{:.1f} %", 100.0 * (1.0 - after / before)) : "0 %";
}

std::string title(const StructuredReport& report) {
  const bool latency = report.asked.starts_with("latency");
  auto out = fmt::format("{}: {} asked, {} {}", report.pruned ? "Pruned" : "Preview", report.asked,
                         latency ? fmt::format("{:.4g} ms", report.achieved) : fmt::format("{:.4f}", report.achieved),
                         latency ? "measured" : "removed");
  if (report.steps > 1) {
    out += fmt::format(" (step {} of {})", report.step, report.steps);
  }
  return out;
}

/// Rows of the table of sizes: name, before, after, removed.
std::vector<std::vector<std::string>> size_rows(const StructuredReport& report) {
  std::vector<std::vector<std::string>> rows{
      {"channels", std::to_string(report.before.channels), std::to_string(report.after.channels),
       percent(static_cast<double>(report.before.channels), static_cast<double>(report.after.channels))},
      {"parameters", std::to_string(report.before.parameters), std::to_string(report.after.parameters),
       percent(static_cast<double>(report.before.parameters), static_cast<double>(report.after.parameters))},
      {"MACs", fmt::format("{:.0f}", report.before.macs), fmt::format("{:.0f}", report.after.macs),
       percent(report.before.macs, report.after.macs)}};
  if (report.latency_after_ms > 0) {
    rows.push_back({"latency (ms)", fmt::format("{:.4g}", report.latency_before_ms),
                    fmt::format("{:.4g}", report.latency_after_ms),
                    percent(report.latency_before_ms, report.latency_after_ms)});
  }
  return rows;
}

/// What stays, by reason: slices and tensors.
std::vector<std::pair<std::string, std::string>> reasons(const StructuredReport& report) {
  std::vector<std::pair<std::string, std::string>> out;
  std::map<std::string, size_t> at;
  for (const auto& pin : report.pinned) {
    if (pin.reason.ends_with("is a kernel's extent")) {
      continue;
    }
    const auto [found, inserted] = at.try_emplace(pin.reason, out.size());
    const auto text = fmt::format("{}[{}] ({})", pin.tensor, pin.dim, pin.size);
    if (inserted) {
      out.emplace_back(pin.reason, text);
    } else {
      out[found->second].second += ", " + text;
    }
  }
  return out;
}

std::string verified(const StructuredReport& report) {
  return fmt::format("outputs equal those of the masked model: largest difference {:.2g} of the largest value; {} {}",
                     report.difference, report.attempts, report.attempts == 1 ? "attempt" : "attempts");
}

}  // namespace

std::string StructuredReport::to_string() const {
  auto out = title(*this) + "\n";
  for (const auto& row : size_rows(*this)) {
    out += fmt::format("  {:<12} {:>14} -> {:>14}  (-{})\n", row[0], row[1], row[2], row[3]);
  }
  if (pruned && !cuts.empty()) {
    out += "  " + verified(*this) + "\n";
  }
  size_t width = 5;
  for (const auto& group : groups) {
    width = std::max(width, group.name.size());
  }
  out += fmt::format("{:<{}}  {:>7}  {:>7}\n", "group", width, "kept", "of");
  for (const auto& group : groups) {
    out += fmt::format("{:<{}}  {:>7}  {:>7}{}{}\n", group.name, width, group.units - group.removed, group.units,
                       group.reason.empty() ? "" : "  ", group.reason);
  }
  for (const auto& fold : folds) {
    out += fmt::format("folded: constants of {} removed channels of {} into {}\n", fold.channels, fold.weight,
                       fold.tensor);
  }
  for (const auto& [reason, what] : reasons(*this)) {
    out += fmt::format("stays: {}: {}\n", what, reason);
  }
  for (const auto& note : notes) {
    out += "note: " + note + "\n";
  }
  return out;
}

std::string StructuredReport::to_html() const {
  auto out = fmt::format("<p><b>{}</b></p>\n<table>\n<tr><th></th><th>before</th><th>after</th><th>removed</th></tr>\n",
                         escaped(title(*this)));
  for (const auto& row : size_rows(*this)) {
    out += fmt::format("<tr><td>{}</td><td>{}</td><td>{}</td><td>{}</td></tr>\n", row[0], row[1], row[2], row[3]);
  }
  out += "</table>\n";
  if (pruned && !cuts.empty()) {
    out += fmt::format("<p>{}</p>\n", escaped(verified(*this)));
  }
  out += "<table>\n<tr><th>group</th><th>kept</th><th>of</th><th></th></tr>\n";
  for (const auto& group : groups) {
    const double share =
        group.units ? 100.0 * static_cast<double>(group.units - group.removed) / static_cast<double>(group.units) : 0;
    out += fmt::format(
        "<tr><td>{}</td><td>{}</td><td>{}</td><td><div style=\"width:120px;background:#ddd\"><div style=\"width:{:.0f}%;"
        "background:#4878a8;height:8px\"></div></div>{}</td></tr>\n",
        escaped(group.name), group.units - group.removed, group.units, share, escaped(group.reason));
  }
  out += "</table>\n";
  for (const auto& fold : folds) {
    out += fmt::format("<p>Folded: constants of {} removed channels of {} into {}</p>\n", fold.channels,
                       escaped(fold.weight), escaped(fold.tensor));
  }
  const auto kept = reasons(*this);
  if (!kept.empty()) {
    out += "<details><summary>What stays, and why</summary><ul>\n";
    for (const auto& [reason, what] : kept) {
      out += fmt::format("<li>{}: {}</li>\n", escaped(what), escaped(reason));
    }
    out += "</ul></details>\n";
  }
  for (const auto& note : notes) {
    out += fmt::format("<p>Note: {}</p>\n", escaped(note));
  }
  return out;
}

}  // namespace rarefy::pruning
