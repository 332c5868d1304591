#pragma once

#include <rarefy/graph/graph.h>
#include <rarefy/pruning/structure.h>

#include <string>
#include <utility>
#include <vector>

#include "../graph/operators.h"
#include "labels.h"

namespace rarefy::pruning {

/// The multiply-accumulates of a node: factor times, for each axis, its labels that are left.
struct LabelledCost {
  int64_t node = -1;
  double factor = 1;
  std::vector<at::Tensor> axes;  // int32, one-dimensional
};

/// A dimension of a parameter or buffer: index i along it started as label first + i.
struct LabelledDimension {
  int64_t value = -1;
  int64_t dim = 0;
  int64_t size = 0;
  int32_t first = 0;
};

/// What the labels of a recording say.
struct Provenance {
  Labels labels;
  std::vector<std::vector<Field>> fields;  // of each value
  std::vector<LabelledDimension> leaves;
  std::vector<LabelledCost> costs;
  /// The role of dimension `dim` of value `v`: roles[v][dim]; -1 where no operator gave it one.
  std::vector<std::vector<int8_t>> roles;
  /// Of each value: what its elements are depends on an example input.
  std::vector<char> depends_on_input;
};

/// An operand of an operator whose elements meet by place: its sizes and fields, aligned to a common rank.
struct Operand {
  std::vector<int64_t> sizes;
  std::vector<Field> fields;
  bool constant = false;  // computed from parameters alone
};

/// Pushes labels through a recording, operator by operator.
class Propagator {
 public:
  Propagator(const graph::Graph& graph, Provenance& out);

  void run(const Pins& pins);

 private:
  using Node = graph::Node;
  using Fields = std::vector<Field>;
  void visit(int64_t index);

  // --- fields of values ---
  Fields fields(int64_t value);
  void set(int64_t value, Fields fields);
  void pin_all(const Fields& fields, int32_t reason);
  Operand operand(int64_t value);
  Operand operand(int64_t value, int64_t rank);  // with dimensions of size 1 in front
  const std::vector<int64_t>& sizes(int64_t value) const { return graph_.values[value].sizes; }
  int64_t rank(int64_t value) const { return static_cast<int64_t>(sizes(value).size()); }
  int32_t reason(const std::string& text);  // of the current node
  int32_t one_unit();                       // the reason of what would leave nothing
  std::vector<int64_t> tensors(const Node& node) const;
  c10::IValue argument(const Node& node, std::string_view name) const;  // None when the operator has no such argument
  void set_role(const Field& field, Role role);

  // --- rules ---
  Fields combine(std::vector<Operand> operands);
  void reduce(Fields& fields, const std::vector<int64_t>& dims, bool may_consume);
  /// Multiplies the operands by place and sums over the last dimension; counts the cost; the fields have that dimension
  /// squeezed away.
  Fields contract(std::vector<Operand> operands, double factor, bool may_consume = true);

  void elementwise(const Node& node);
  void movement(const Node& node);
  void index(const Node& node);
  void concatenation(const Node& node);
  void stacking(const Node& node);
  void padding(const Node& node);
  void reduction(const Node& node);
  void along(const Node& node);
  void spatial(const Node& node, int64_t n);
  void glu(const Node& node);
  void factory(const Node& node);
  void unknown(const Node& node);

  void linear(const Node& node);
  void matmul(const Node& node, int64_t a, int64_t b, int64_t added);
  void convolution(const Node& node, bool transposed);
  void attention(const Node& node);
  void recurrent(const Node& node);
  void embedding(const Node& node);

  void channel_norm(const Node& node, int64_t channel_dim, const std::vector<int64_t>& parameters);
  void layer_norm(const Node& node, const std::vector<size_t>& parameters);
  void group_norm(const Node& node);
  void fake_quantize(const Node& node);

  /// Makes what is removed of every tensor whole rows or whole columns.
  void make_rectangular();
  std::vector<at::Tensor> run_on_labels(const Node& node, const at::Tensor& labels);

  const graph::Graph& graph_;
  Provenance& out_;
  Labels& labels_;
  int64_t current_ = -1;
  std::pair<int64_t, int32_t> one_unit_{-2, -1};  // the node that it was made for, and the reason
  std::vector<char> made_;
};

}  // namespace rarefy::pruning
