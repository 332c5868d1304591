// From a recording of a model to ONNX operators.
#pragma once

#include <rarefy/graph/graph.h>
#include <rarefy/nn/quantizable.h>
#include <rarefy/onnx/weight_form.h>

#include <cstdint>
#include <functional>
#include <map>
#include <optional>
#include <string>
#include <string_view>
#include <unordered_map>
#include <unordered_set>
#include <utility>
#include <vector>

#include "onnx/model.h"

namespace rarefy::onnx {

/// A grid of the model as ONNX says it: scale and zero point (0-d, or 1-d along `axis`) and the integers that are used.
struct Grid {
  at::Tensor scale;
  at::Tensor zero_point;  // of the type of the integers
  std::optional<int64_t> axis;
  int64_t qmin = 0, qmax = 0;
};

/// The integers of a weight.
struct IntegerTensor {
  at::Tensor values;
  Grid grid;
};

struct TranslateOptions {
  int64_t opset = 0;
  /// Write int8 activations as uint8: zero point and range move by 128, and no value changes.
  bool unsigned_activations = true;
  /// Write the zero points of weights, which are all 0.
  bool weight_zero_points = true;
  /// The integers of embedding tables by the name of their parameter. A scale of one element is that of the whole table.
  std::unordered_map<std::string, nn::IntegerWeight> tables;
  /// The names of those tables' scales: what is rounded with them was looked up, and is on the grid already.
  std::unordered_set<std::string> table_scales;
  std::vector<std::string> input_names, output_names;
};

/// The same run on batches of several sizes; without `others`, all sizes are those of `graph`.
struct Recording {
  struct Run {
    graph::Graph graph;
    int64_t batch = 0;
  };
  graph::Graph graph;
  int64_t batch = 0;  // of `graph`
  std::vector<Run> others;
};

class Translator;

/// One operator of the recording, as the rules see it. Arguments go by the names of the operator's schema.
class Call {
 public:
  /// `others` are the same call in the other runs.
  Call(Translator& translator, const graph::Node& node, std::vector<const graph::Node*> others)
      : t(translator), node_(node), others_(std::move(others)) {}

  Translator& t;

  /// Whether the argument is there: a tensor, or a value that is not None.
  bool has(std::string_view name) const;
  bool is_tensor(std::string_view name) const { return id_of(name) >= 0; }
  /// The tensor argument, or the number in its place as a constant.
  Value* tensor(std::string_view name) const;
  std::vector<Value*> tensors(std::string_view name) const;
  Value* optional_tensor(std::string_view name) const;
  /// The values of a tensor that is the same in every run; undefined when it is not, or absent.
  at::Tensor constant(std::string_view name) const;
  /// The constant weight with its last two dimensions exchanged, integers where it is quantized; null when it is not constant.
  Value* transposed_weight(std::string_view name) const;

  int64_t integer(std::string_view name) const;
  double number(std::string_view name) const;
  bool flag(std::string_view name) const;
  std::string text(std::string_view name) const;
  /// A list of integers, or one integer `count` times.
  std::vector<int64_t> integers(std::string_view name, size_t count = 0) const;

  Shape shape_of(std::string_view name) const;
  int64_t rank_of(std::string_view name) const { return static_cast<int64_t>(shape_of(name).size()); }
  at::ScalarType dtype_of(std::string_view name) const;
  Shape result_shape(size_t i = 0) const;
  at::ScalarType result_dtype() const;
  /// Whether the result has the sizes of the argument in every run.
  bool keeps_shape_of(std::string_view name) const;
  size_t results() const { return node_.outputs.size(); }
  std::string_view overload() const { return node_.op.overload_name; }
  const graph::Node& node() const { return node_; }
  /// A dimension that counts from the front.
  int64_t dimension(std::string_view name, int64_t rank) const;

  [[noreturn]] void refuse(const std::string& why) const;

 private:
  std::optional<size_t> find(std::string_view name) const;
  int64_t id_of(std::string_view name) const;
  const c10::IValue& literal(std::string_view name) const;

  const graph::Node& node_;
  std::vector<const graph::Node*> others_;
};

/// What one operator becomes: the values of its results.
using Rule = std::function<std::vector<Value*>(const Call&)>;
using Rules = std::unordered_map<std::string_view, Rule>;

/// A weight [in / groups, out, kernel...], which has an axis of all output channels, as [in, out / groups, kernel...].
Value* by_group(Translator& t, Value* weight, const std::vector<int64_t>& sizes, int64_t groups);

/// x on a grid with constant scale and zero point, which `axis` says the channels of.
Value* quantize_on_grid(const Call& c, const at::Tensor& scale, const at::Tensor& zero_point,
                        std::optional<int64_t> axis, int64_t qmin, int64_t qmax);
/// Whether an operator rounds its first argument to a format: what a weight in a file is stored by.
bool rounds_to_format(const graph::Node& node);
/// The integers of a product of int8 and a scale per row, as an int8 base of adapters is read; unset for others.
std::optional<IntegerTensor> scaled_rows(const Translator& t, const graph::Node& node);

// The table, by operator name without "aten::"; the rule of "relu" is that of "relu_" too.
void add_bag_rules(Rules& rules);
void add_elementwise_rules(Rules& rules);
void add_movement_rules(Rules& rules);
void add_layer_rules(Rules& rules);
void add_quantization_rules(Rules& rules);
void add_format_rules(Rules& rules);
void add_converted_rules(Rules& rules);
void add_packed_rules(Rules& rules);

class Translator {
 public:
  Translator(const Recording& recording, TranslateOptions options);

  /// Throws c10::ValueError that lists every operator without a rule, and for what a rule cannot express.
  Model run();

  // ---- for the rules
  Model& model() { return model_; }
  int64_t opset() const { return options_.opset; }
  const TranslateOptions& options() const { return options_; }
  /// The value of a tensor of the recording.
  Value* value(int64_t id, std::string_view role = "constant");
  /// The quantized weight that a constant of the recording holds; unset for others.
  std::optional<IntegerTensor> integers(int64_t id) const;
  /// The same of weights in formats beside plain grids.
  std::optional<quantization::QuantizedTensorParts> stored(int64_t id) const;
  /// The parts that an operator reads a weight from, as packed layers and NF4 bases of adapters keep theirs; unset for others.
  std::optional<quantization::QuantizedTensorParts> packed(const graph::Node& node) const;
  /// The weight of those parts, in the file once, however often it is read.
  Value* packed_weight(const graph::Node& node, bool transposed);
  Value* transposed(int64_t id, std::string_view role);
  /// Nodes of the current module. The result has the type of the first input unless told.
  Value* emit(const std::string& op, std::vector<Value*> inputs, Attributes attributes = {},
              std::optional<at::ScalarType> dtype = std::nullopt);
  std::vector<Value*> emit_several(size_t count, const std::string& op, std::vector<Value*> inputs,
                                   Attributes attributes = {});
  /// int64, 1-d.
  Value* integers(const std::vector<int64_t>& values);
  Value* scalar(double number, at::ScalarType dtype);
  Value* constant(const at::Tensor& tensor, std::string_view role = "constant");
  Value* cast(Value* x, at::ScalarType dtype);
  /// ReduceSum, ReduceMax, ... along axes; along all of them where none is named.
  Value* reduce(const std::string& op, Value* x, const std::vector<int64_t>& axes, bool keeps_axes);
  /// x in another shape of as many elements; in any batch.
  Value* reshape(Value* x, const Shape& shape);
  /// A shape as int64 values, computed from the batch where it follows that.
  Value* shape_value(const Shape& shape);
  /// The integers of a weight behind DequantizeLinear.
  Value* weight(const IntegerTensor& weight, std::string_view role);
  /// The codes of a weight behind the operators of their format.
  Value* weight(const quantization::QuantizedTensorParts& parts, bool transposed, std::string_view role);
  /// A grid of activations in the types of the target.
  Grid as_written(Grid grid) const;
  Value* quantize(Value* x, const Grid& grid);
  Value* dequantize(Value* q, const Grid& grid);

  const graph::Graph& graph() const { return recording_.graph; }
  const Recording& recording() const { return recording_; }
  /// The node that made a value of the recording, also where constants were folded since; null when none did.
  const graph::Node* maker(int64_t id) const;
  Shape shape_of(int64_t id) const;
  /// Throws c10::ValueError, naming the operator that is translated and its module.
  [[noreturn]] void refuse(const std::string& why) const;

 private:
  void check_rules() const;
  void run_node(const graph::Node& node, size_t place);
  void check_views(int64_t written, size_t place) const;
  std::string name_here(std::string_view what) const;
  std::string owner(int64_t id) const;
  std::string module_of(const graph::Node& node) const;
  std::string describe(const graph::Node& node) const;
  bool is_passed_on(const graph::Node& node) const;
  void set(int64_t id, Value* value);
  Value* batch();
  Value* batch_constant(int64_t id, std::string_view role);

  const Recording& recording_;
  TranslateOptions options_;
  Model model_;
  std::unordered_map<int64_t, Value*> values_;
  std::unordered_map<int64_t, Value*> transposed_;
  std::map<std::pair<int64_t, bool>, Value*> packed_weights_;  // by their first part, and whether they are transposed
  std::unordered_map<std::string, Value*> small_;              // constants by their contents
  std::unordered_map<int64_t, int64_t> makers_;  // of a value: the node that made it, before constants were folded
  const graph::Node* current_ = nullptr;         // what is translated
  std::string module_;                           // of that
  Value* batch_ = nullptr;
};

/// The rule of an operator; null when there is none.
const Rule* find_rule(const c10::OperatorName& op);

}  // namespace rarefy::onnx
