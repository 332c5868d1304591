#pragma once

#include <rarefy/graph/graph.h>

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

namespace rarefy::graph {

/// "[1, 64, 8, 8]", and the dtype behind it when it is not float.
std::string shape_string(const Value& value);

/// "layer1.conv1.weight", or ".weight" for a line of module layer1.conv1; "%12" for what has no name.
std::string value_string(const Graph& graph, int64_t id, std::string_view module);

/// The tensors that an operator reads, in order.
std::string tensors_string(const Graph& graph, const Node& node);

/// "stride=[2, 2] padding=[1, 1]": the constants that differ from the operator's defaults.
std::string constants_string(const Node& node);

/// What it calls the operator: "conv2d", "rarefy::relu".
std::string short_name(const Node& node);

/// Lines with columns below each other, two spaces apart; those marked in `right` are flush right. A cell that is wider
/// than `limit` does not widen its column.
std::string table_string(const std::vector<std::vector<std::string>>& rows, const std::string& right,
                         size_t limit = 1000);

/// "1.82 G", "11.7 M", "512".
std::string count_string(double count);

}  // namespace rarefy::graph
