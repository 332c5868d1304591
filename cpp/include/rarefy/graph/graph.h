#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/core/ivalue.h>
#include <ATen/core/operator_name.h>
#include <rarefy/export.h>

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

// A recording of one eager forward pass: every operator that ran, its tensors and its constants. Dependency groups,
// batch-norm pairs, MAC counts and drawings all read this one structure.
namespace rarefy::graph {

enum class Origin {
  input,         // an example input
  parameter,     // of the model
  buffer,        // of the model
  constant,      // neither, and made outside of the recorded operators: a plain tensor attribute, a tensor from numpy
  intermediate,  // the result of a recorded operator
};

RAREFY_API const char* name(Origin origin);

/// A tensor of the recording. Operators that change a tensor in place have it as input and as output.
struct RAREFY_API Value {
  Origin origin = Origin::intermediate;
  std::string name;  // path of a parameter or buffer, "input.<n>" of an input; empty otherwise
  std::vector<int64_t> sizes;
  at::ScalarType dtype = at::kFloat;
  /// Undefined for floating-point intermediates, which are not kept unless returned. One that operators change in place
  /// has its last contents.
  at::Tensor tensor;
  int64_t producer = -1;           // the node that made it; -1 when none did
  std::vector<int64_t> consumers;  // the nodes that read it, in order
  bool is_output = false;          // the model returned it
  int64_t memory = -1;             // the first value in the same memory: this one, unless it is a view of another

  int64_t numel() const;
};

/// One call of an operator. Values are indices into Graph::values.
struct RAREFY_API Node {
  c10::OperatorName op{"", ""};     // "aten::conv2d" and its overload
  std::vector<c10::IValue> inputs;  // the arguments by position; None in the place of tensors and lists of tensors
  std::vector<std::vector<int64_t>> input_values;  // of each argument: the tensor(s) in it, -1 for an absent one
  std::vector<int64_t> outputs;                    // all tensors that it returned, lists flattened
  int64_t parent = -1;       // of a node inside of a composite operator: that operator; -1 for what the model called
  int64_t children_end = 0;  // the nodes after this one up to here, exclusive, ran inside of it
  std::string module;        // path of the innermost module that was running; empty for the model itself
  std::string source;        // "file.py:12" of the line of the model's code; empty when not known
  bool failed = false;       // it threw; when the model went on, it is not in the schedule

  /// "aten::conv2d (layer1.0.conv1, model.py:31)".
  std::string describe() const;
  /// The tensor of argument `i`; -1 when it is absent or not a tensor.
  int64_t input(size_t i) const;
};

/// A recorded run. Plain data: copying it copies references to the model's tensors, not the tensors.
struct RAREFY_API Graph {
  std::vector<Value> values;
  std::vector<Node> nodes;        // in the order of their start
  std::vector<int64_t> inputs;    // values of the example inputs, in order
  std::vector<int64_t> outputs;   // values that the model returned, in order
  std::vector<int64_t> schedule;  // the nodes to run, in order, to compute the outputs: composite operators that the
                                  // analyses do not know are replaced by what ran inside of them

  /// The value of a parameter or buffer; -1 when the run did not touch it.
  int64_t find(const std::string& name) const;
  /// A table with one line per scheduled operator: number, outputs with sizes, operator, tensors, constants that differ
  /// from the operator's defaults, module, source line. Parameters of the line's module stand without its path (.weight).
  std::string to_string() const;
  /// How many operators and parameters, and the shapes of inputs and outputs, on one line.
  std::string describe() const;
};

}  // namespace rarefy::graph
