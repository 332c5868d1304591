#include <rarefy/graph/graph.h>

namespace rarefy::graph {
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

}  // namespace rarefy::graph
