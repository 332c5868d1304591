// A model in ONNX's terms, in memory: what the translation makes, the passes change and the writer writes.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/core/ScalarType.h>

#include <cstdint>
#include <deque>
#include <list>
#include <memory>
#include <string>
#include <string_view>
#include <unordered_map>
#include <utility>
#include <variant>
#include <vector>

namespace rarefy::onnx {

/// A size: fixed (per_batch is 0), per_batch times the size of the batch, or not known before the run (per_batch is -1).
struct Dim {
  int64_t size = 0;  // when not fixed: that of the example
  int64_t per_batch = 0;

  bool is_fixed() const { return per_batch == 0; }
  bool operator==(const Dim&) const = default;
};
using Shape = std::vector<Dim>;

/// A shape of fixed sizes.
Shape fixed(at::IntArrayRef sizes);

using AttributeValue = std::variant<int64_t, float, std::string, std::vector<int64_t>>;
using Attributes = std::vector<std::pair<std::string, AttributeValue>>;

struct Node;

struct Value {
  std::string name;
  at::ScalarType dtype = at::kFloat;
  Shape shape;
  bool has_shape = false;
  at::Tensor constant;           // of an initializer
  bool is_int4 = false;          // its integers, int8 or uint8 in memory, are stored in 4 bits
  Node* producer = nullptr;      // null for inputs and initializers
  std::vector<Node*> consumers;  // one entry per use
};

struct Node {
  std::string op;
  std::string name;
  std::vector<Value*> inputs;  // null for one that is left out
  std::vector<Value*> outputs;
  Attributes attributes;
  bool removed = false;

  Value* input(size_t i) const { return i < inputs.size() ? inputs[i] : nullptr; }
  int64_t integer(std::string_view attribute, int64_t otherwise) const;
};

/// Owns values and nodes; addresses stay valid as long as it lives.
class Model {
 public:
  std::vector<Value*> inputs;
  std::vector<Value*> outputs;
  std::vector<std::string> output_names;

  Value* add_input(const std::string& name, at::ScalarType dtype, Shape shape);
  /// An initializer; dense and on the CPU from here on.
  Value* add_constant(const std::string& name, const at::Tensor& tensor);
  /// A node in front of `before`, at the end when null. Nodes and their results are called `name`, numbered where it is taken.
  Node* add_node(const std::string& name, const std::string& op, std::vector<Value*> inputs, Attributes attributes,
                 at::ScalarType dtype, size_t outputs = 1, const Node* before = nullptr);
  void set_input(Node* node, size_t i, Value* value);
  /// Lets what reads `old` read `value`, outputs of the model included.
  void replace(Value* old, Value* value);
  /// Removes a node that nobody reads.
  void remove(Node* node);
  bool is_output(const Value* value) const;
  /// Removes what has no effect on the outputs.
  void remove_unused();
  /// The nodes of these types at the time of the call, in order.
  std::vector<Node*> nodes(const std::vector<std::string_view>& ops) const;
  const std::list<std::unique_ptr<Node>>& nodes() const { return nodes_; }
  /// The initializers that something reads, in order of their making.
  std::vector<const Value*> constants() const;
  /// Gives the outputs their names; one that is an input, an initializer or another output comes through an Identity.
  void name_outputs();
  /// Asserts what every writer of a graph owes its readers: what a node reads was made before it, and names are different.
  void check() const;

 private:
  Value* add_value(const std::string& name, at::ScalarType dtype);
  std::string unique(const std::string& name);

  std::deque<Value> values_;
  std::list<std::unique_ptr<Node>> nodes_;
  std::vector<std::unique_ptr<Node>> removed_;  // passes may hold their addresses
  std::unordered_map<const Node*, std::list<std::unique_ptr<Node>>::iterator> places_;
  std::unordered_map<std::string, int64_t> names_;
};

}  // namespace rarefy::onnx
