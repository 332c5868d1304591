#include <rarefy/graph/graph.h>

#include <sstream>

namespace rarefy::graph {
namespace {

std::string sizes_string(const std::vector<int64_t>& sizes) {
  std::ostringstream out;
  out << '[';
  for (size_t i = 0; i < sizes.size(); ++i) {
    out << (i ? ", " : "") << sizes[i];
  }
  out << ']';
  return out.str();
}

void print_value(std::ostream& out, const Graph& graph, int64_t id) {
  if (id < 0) {
    out << "None";
    return;
  }
  const Value& value = graph.values[id];
  if (value.name.empty()) {
    out << '%' << id;
  } else {
    out << value.name;
  }
  out << sizes_string(value.sizes);
}

void print_argument(std::ostream& out, const Graph& graph, const Node& node, size_t i) {
  const auto& ids = node.input_values[i];
  if (ids.empty()) {
    std::ostringstream text;
    text << node.inputs[i];
    out << text.str().substr(0, 60);
  } else if (ids.size() == 1) {
    print_value(out, graph, ids[0]);
  } else {
    out << '(';
    for (size_t k = 0; k < ids.size(); ++k) {
      out << (k ? ", " : "");
      print_value(out, graph, ids[k]);
    }
    out << ')';
  }
}

}  // namespace

const char* name(Origin origin) {
  switch (origin) {
    case Origin::input:
      return "input";
    case Origin::parameter:
      return "parameter";
    case Origin::buffer:
      return "buffer";
    case Origin::constant:
      return "constant";
    case Origin::intermediate:
      return "intermediate";
  }
  return "";
}

int64_t Value::numel() const {
  int64_t count = 1;
  for (auto size : sizes) {
    count *= size;
  }
  return count;
}

std::string Node::describe() const {
  std::string where = module;
  if (!source.empty()) {
    where += (where.empty() ? "" : ", ") + source;
  }
  return op.name + (where.empty() ? "" : " (" + where + ")");
}

int64_t Node::input(size_t i) const {
  return i < input_values.size() && !input_values[i].empty() ? input_values[i][0] : -1;
}

int64_t Graph::find(const std::string& wanted) const {
  for (size_t i = 0; i < values.size(); ++i) {
    if (values[i].name == wanted) {
      return static_cast<int64_t>(i);
    }
  }
  return -1;
}

std::string Graph::to_string() const {
  std::ostringstream out;
  for (auto id : schedule) {
    const Node& node = nodes[id];
    out << '#' << id << ' ';
    for (size_t i = 0; i < node.outputs.size(); ++i) {
      out << (i ? ", " : "");
      print_value(out, *this, node.outputs[i]);
    }
    out << " = " << node.op.name << '(';
    for (size_t i = 0; i < node.inputs.size(); ++i) {
      out << (i ? ", " : "");
      print_argument(out, *this, node, i);
    }
    out << ')';
    if (!node.module.empty() || !node.source.empty()) {
      out << "  # " << node.module << (node.module.empty() || node.source.empty() ? "" : ", ") << node.source;
    }
    out << '\n';
  }
  out << "returns";
  for (auto id : outputs) {
    out << ' ';
    print_value(out, *this, id);
  }
  out << '\n';
  return out.str();
}

}  // namespace rarefy::graph
