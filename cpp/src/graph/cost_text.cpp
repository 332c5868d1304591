#include <fmt/format.h>
#include <fmt/ranges.h>
#include <rarefy/graph/cost.h>

#include "html.h"
#include "text.h"

namespace rarefy::graph {
namespace {

using Row = std::vector<std::string>;

std::string bytes_string(int64_t bytes) {
  const auto size = static_cast<double>(bytes);
  return size >= 0.9995 * (1 << 20) ? fmt::format("{:.2f} MiB", size / (1 << 20))
         : size >= 1000             ? fmt::format("{:.1f} KiB", size / (1 << 10))
                                    : fmt::format("{} B", bytes);
}

Row cells(const Cost& cost) {
  return {count_string(static_cast<double>(cost.macs)), count_string(static_cast<double>(cost.flops)),
          count_string(static_cast<double>(cost.parameters)), bytes_string(cost.parameter_bytes),
          bytes_string(cost.activation_bytes)};
}

Row joined(Row head, const Row& tail) {
  head.insert(head.end(), tail.begin(), tail.end());
  return head;
}

const Row kHead{"MACs", "FLOPs", "parameters", "parameter bytes", "activation bytes"};

/// Rows with a head: by operator the whole run comes last, by module it comes first.
std::vector<Row> rows_of(const Costs& costs, bool by_operator) {
  std::vector<Row> rows;
  if (by_operator) {
    rows.push_back(joined({"operator"}, kHead));
    for (size_t i = 0; i < costs.operators.size(); ++i) {
      rows.push_back(joined({costs.names[i]}, cells(costs.operators[i].cost)));
    }
    rows.push_back(joined({"total"}, cells(costs.total)));
    return rows;
  }
  rows.push_back(joined({"module", "operators", "last result"}, kHead));
  for (const auto& module : costs.modules) {
    size_t depth = 0;
    for (const char c : module.module) {
      depth += c == '.';
    }
    const auto name = module.module.empty() ? "(model)" : std::string(2 * (depth + 1), ' ') + module.module;
    rows.push_back(joined({name, std::to_string(module.operators),
                           module.operators ? fmt::format("[{}]", fmt::join(module.output_sizes, ", ")) : ""},
                          cells(module.cost)));
  }
  return rows;
}

/// "aten::sort (head, model.py:12), aten::..." or nothing.
std::string uncounted_string(const Costs& costs) {
  Row out;
  for (size_t i = 0; i < costs.operators.size(); ++i) {
    for (auto node : costs.uncounted) {
      if (costs.operators[i].node == node) {
        out.push_back(costs.names[i]);
      }
    }
  }
  return fmt::format("{}", fmt::join(out, ", "));
}

}  // namespace

std::string Costs::to_string(bool by_operator) const {
  auto out = table_string(rows_of(*this, by_operator), by_operator ? "lrrrrr" : "lrlrrrrr");
  if (!uncounted.empty()) {
    out += fmt::format("not counted: {}\n", uncounted_string(*this));
  }
  return out;
}

std::string Costs::to_html(bool by_operator) const {
  std::string out = "<table>\n";
  const size_t texts = by_operator ? 1 : 3;
  bool head = true;
  for (const auto& row : rows_of(*this, by_operator)) {
    out += "<tr>";
    for (size_t i = 0; i < row.size(); ++i) {
      const auto indent = row[i].find_first_not_of(' ');
      const bool indented = i == 0 && indent != std::string::npos && indent > 0;
      out += fmt::format("<{0} style=\"text-align:{1}{2}\">{3}</{0}>", head ? "th" : "td", i < texts ? "left" : "right",
                         indented ? fmt::format(";padding-left:{}em", 0.7 * static_cast<double>(indent)) : "",
                         escaped(indented ? row[i].substr(indent) : row[i]));
    }
    out += "</tr>\n";
    head = false;
  }
  out += "</table>\n";
  if (!uncounted.empty()) {
    out += fmt::format("<p>Not counted: {}</p>\n", escaped(uncounted_string(*this)));
  }
  return out;
}

}  // namespace rarefy::graph
