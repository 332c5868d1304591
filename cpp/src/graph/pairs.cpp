#include <rarefy/graph/pairs.h>

#include <algorithm>
#include <optional>

#include "call.h"
#include "dataflow.h"
#include "operators.h"

namespace rarefy::graph {
namespace {

class Search {
 public:
  explicit Search(const Graph& graph) : graph_(graph), flow_(dataflow(graph)) {}

  std::optional<ConvBnPair> pair_of(int64_t norm) const {
    const Node& node = graph_.nodes[norm];
    if (node.op.name != "aten::batch_norm" || node.inputs[5].toBool() || node.input(3) < 0 || node.input(4) < 0) {
      return std::nullopt;
    }
    const int64_t between = node.input(0);
    const int64_t conv = writer_of_input(norm);
    if (conv < 0 || graph_.values[between].is_output || flow_.consumers[between].size() != 1 ||
        flow_.consumers[between][0] != norm || graph_.nodes[conv].outputs != std::vector<int64_t>{between}) {
      return std::nullopt;
    }
    const Node& layer = graph_.nodes[conv];
    const auto weight_rank = graph_.values[std::max<int64_t>(layer.input(1), 0)].sizes.size();
    bool transposed = false;
    switch (kind_of(layer.op)) {
      case Kind::linear:
      case Kind::convolution:
        break;
      case Kind::transposed_convolution:
        transposed = true;
        break;
      case Kind::general_convolution:
        transposed = argument(layer, "transposed").toBool();
        break;
      default:
        return std::nullopt;
    }
    // The normalization runs along dimension 1, which holds the output channels only with one batch dimension.
    if (layer.input(1) < 0 || weight_rank < 2 || graph_.values[between].sizes.size() != weight_rank) {
      return std::nullopt;
    }
    for (const auto& [value, reader] : {std::pair{layer.input(1), conv},
                                        {layer.input(2), conv},
                                        {node.input(1), norm},
                                        {node.input(2), norm},
                                        {node.input(3), norm},
                                        {node.input(4), norm}}) {
      if (value >= 0 && !is_own(value, reader)) {
        return std::nullopt;
      }
    }
    return ConvBnPair{conv,          norm,          name(layer, 1), name(layer, 2),     name(node, 1),
                      name(node, 2), name(node, 3), name(node, 4),  transposed ? 1 : 0, node.inputs[7].toDouble()};
  }

 private:
  int64_t writer_of_input(int64_t index) const {
    for (const auto& read : flow_.reads[index]) {
      if (read.value == graph_.nodes[index].input(0)) {
        return read.writer;
      }
    }
    return -1;
  }

  /// A parameter or buffer that this node alone reads.
  bool is_own(int64_t value, int64_t reader) const {
    const auto origin = graph_.values[value].origin;
    return (origin == Origin::parameter || origin == Origin::buffer) && !graph_.values[value].is_output &&
           flow_.consumers[value] == std::vector<int64_t>{reader};
  }

  std::string name(const Node& node, size_t i) const {
    return node.input(i) < 0 ? std::string() : graph_.values[node.input(i)].name;
  }

  const Graph& graph_;
  Dataflow flow_;
};

}  // namespace

std::vector<ConvBnPair> conv_bn_pairs(const Graph& graph) {
  const Search search(graph);
  std::vector<ConvBnPair> out;
  for (auto index : graph.schedule) {
    if (auto pair = search.pair_of(index)) {
      out.push_back(std::move(*pair));
    }
  }
  return out;
}

}  // namespace rarefy::graph
