#include "text.h"

#include <ATen/core/dispatch/Dispatcher.h>
#include <fmt/format.h>
#include <fmt/ranges.h>

#include <algorithm>
#include <sstream>

namespace rarefy::graph {
namespace {

constexpr size_t kLongest = 60;     // of one constant
constexpr size_t kWidestCell = 64;  // that widens its column

/// An enumeration that a schema's argument holds as a number.
std::string constant_string(const c10::Argument* argument, const c10::IValue& value) {
  if (argument && value.isInt()) {
    auto type = argument->real_type();
    if (const auto optional = type->cast<c10::OptionalType>()) {
      type = optional->getElementType();
    }
    std::ostringstream out;
    switch (type->kind()) {
      case c10::TypeKind::ScalarTypeType:
        return c10::toString(static_cast<at::ScalarType>(value.toInt()));
      case c10::TypeKind::MemoryFormatType:
        out << static_cast<at::MemoryFormat>(value.toInt());
        return out.str();
      case c10::TypeKind::LayoutType:
        out << static_cast<at::Layout>(value.toInt());
        return out.str();
      default:
        break;
    }
  }
  if (value.isDouble()) {
    return fmt::format("{:g}", value.toDouble());
  }
  std::ostringstream text;
  text << value;
  auto out = text.str();
  return out.size() > kLongest ? out.substr(0, kLongest - 3) + "..." : out;
}

bool is_default(const c10::Argument* argument, const c10::IValue& value) {
  return value.isNone() || (argument && argument->default_value() && *argument->default_value() == value);
}

/// The number of characters: UTF-8 continuation bytes do not count.
size_t width_of(const std::string& text) {
  return static_cast<size_t>(std::count_if(text.begin(), text.end(), [](char c) { return (c & 0xC0) != 0x80; }));
}

}  // namespace

std::string shape_string(const Value& value) {
  auto out = fmt::format("[{}]", fmt::join(value.sizes, ", "));
  return value.dtype == at::kFloat ? out : fmt::format("{} {}", out, c10::toString(value.dtype));
}

std::string value_string(const Graph& graph, int64_t id, std::string_view module) {
  if (id < 0) {
    return "None";
  }
  const auto& name = graph.values[id].name;
  if (name.empty()) {
    return fmt::format("%{}", id);
  }
  const bool inside = !module.empty() && name.size() > module.size() + 1 && name.starts_with(module) &&
                      name[module.size()] == '.' && name.find('.', module.size() + 1) == std::string::npos;
  return inside ? name.substr(module.size()) : name;
}

std::string tensors_string(const Graph& graph, const Node& node) {
  std::vector<std::string> out;
  for (const auto& ids : node.input_values) {
    std::vector<std::string> items;
    for (auto id : ids) {
      items.push_back(value_string(graph, id, node.module));
    }
    if (items.size() == 1) {
      out.push_back(items[0]);
    } else if (!items.empty()) {
      out.push_back(fmt::format("({})", fmt::join(items, ", ")));
    }
  }
  return fmt::format("{}", fmt::join(out, ", "));
}

std::string constants_string(const Node& node) {
  const auto handle = c10::Dispatcher::singleton().findSchema(node.op);
  std::vector<std::string> out;
  for (size_t i = 0; i < node.inputs.size(); ++i) {
    const auto* argument =
        handle && i < handle->schema().arguments().size() ? &handle->schema().arguments()[i] : nullptr;
    // Which library computes is no property of the result.
    const bool backend = argument && argument->name() == "cudnn_enabled";
    if (backend || !node.input_values[i].empty() || is_default(argument, node.inputs[i])) {
      continue;
    }
    const auto text = constant_string(argument, node.inputs[i]);
    out.push_back(argument ? argument->name() + "=" + text : text);
  }
  return fmt::format("{}", fmt::join(out, " "));
}

std::string short_name(const Node& node) {
  return node.op.name.starts_with("aten::") ? node.op.name.substr(6) : node.op.name;
}

std::string table_string(const std::vector<std::vector<std::string>>& rows, const std::string& right, size_t limit) {
  std::vector<size_t> widths;
  for (const auto& row : rows) {
    widths.resize(std::max(widths.size(), row.size()), 0);
    for (size_t i = 0; i < row.size(); ++i) {
      if (const auto width = width_of(row[i]); width <= limit) {
        widths[i] = std::max(widths[i], width);
      }
    }
  }
  std::string out;
  for (const auto& row : rows) {
    std::string line;
    size_t wanted = 0;  // where the column starts; a cell that is too wide moves those behind it as little as it must
    for (size_t i = 0; i < row.size(); ++i) {
      const bool flush = i < right.size() && right[i] == 'r';
      const auto width = width_of(row[i]);
      size_t at = wanted + (flush && widths[i] > width ? widths[i] - width : 0);
      const auto used = width_of(line);
      at = i > 0 ? std::max(at, used + (row[i].empty() ? 0 : 2)) : at;
      line += std::string(at > used ? at - used : 0, ' ') + row[i];
      wanted += widths[i] + 2;
    }
    line.erase(line.find_last_not_of(' ') + 1);
    out += line + "\n";
  }
  return out;
}

std::string count_string(double count) {
  for (const auto& [unit, name] : {std::pair{1e12, "T"}, {1e9, "G"}, {1e6, "M"}}) {
    if (count >= 0.9995 * unit) {
      const double scaled = count / unit;
      return fmt::format("{:.{}f} {}", scaled, scaled < 9.995 ? 2 : scaled < 99.95 ? 1 : 0, name);
    }
  }
  auto digits = fmt::format("{:.0f}", count);
  for (int at = static_cast<int>(digits.size()) - 3; at > 0; at -= 3) {
    digits.insert(static_cast<size_t>(at), 1, ',');
  }
  return digits;
}

std::string Graph::to_string() const {
  std::vector<std::vector<std::string>> rows{{"#", "output", "operator", "tensors", "constants", "module", "source"}};
  for (auto id : schedule) {
    const Node& node = nodes[id];
    std::vector<std::string> results;
    for (auto value : node.outputs) {
      results.push_back(value < 0 ? "None"
                                  : fmt::format("{} {}", value_string(*this, value, ""), shape_string(values[value])));
    }
    rows.push_back({std::to_string(id), fmt::format("{}", fmt::join(results, ", ")), node.op.name,
                    tensors_string(*this, node), constants_string(node), node.module, node.source});
  }
  std::vector<std::string> returned;
  for (auto id : outputs) {
    returned.push_back(fmt::format("{} {}", value_string(*this, id, ""), shape_string(values[id])));
  }
  return describe() + "\n" + table_string(rows, "r", kWidestCell) +
         fmt::format("returns {}\n", fmt::join(returned, ", "));
}

std::string Graph::describe() const {
  int64_t parameters = 0, elements = 0;
  for (const auto& value : values) {
    if (value.origin == Origin::parameter) {
      ++parameters;
      elements += value.numel();
    }
  }
  const auto shapes = [&](const std::vector<int64_t>& ids) {
    std::vector<std::string> out;
    for (auto id : ids) {
      out.push_back(shape_string(values[id]));
    }
    return fmt::format("{}", fmt::join(out, ", "));
  };
  return fmt::format("Graph({} operators, {} parameters of {} elements, {} -> {})", schedule.size(), parameters,
                     count_string(static_cast<double>(elements)), shapes(inputs), shapes(outputs));
}

}  // namespace rarefy::graph
