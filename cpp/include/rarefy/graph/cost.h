#pragma once

#include <rarefy/export.h>
#include <rarefy/graph/graph.h>

#include <cstdint>
#include <string>
#include <vector>

// What a recorded run costs, counted from the shapes that occurred.
namespace rarefy::graph {

/// Work and memory of one operator, one module, or the whole run.
struct RAREFY_API Cost {
  /// Multiply-accumulates of convolutions, products of matrices, attention (both products) and recurrent layers.
  int64_t macs = 0;
  /// Floating-point operations: 2 per multiply-accumulate (an added bias is not counted), and
  ///   per element of the result: 1 for an element-wise operator, 2 for batch normalization in evaluation and for a
  ///     gated linear unit, 2 per tap for an interpolation (nearest: 0), the window's size for pooling;
  ///   per element of the input: 1 for a reduction, a scan, a sort and adaptive pooling, 4 for RMS norm, 5 for softmax
  ///     (inside of attention too), 7 for layer, group, instance and batch norm with statistics of the input, 3 for
  ///     weight norm;
  ///   0 for what moves, indexes, looks up, converts or creates elements, and for the gates of a recurrent layer.
  int64_t flops = 0;
  int64_t parameters = 0;  // elements; of an operator: of the parameters that it is the first to read
  int64_t parameter_bytes = 0;
  int64_t activation_bytes = 0;  // of the results that take memory of their own: views and in-place results take none

  Cost& operator+=(const Cost& other);
};

struct RAREFY_API OperatorCost {
  int64_t node = -1;
  Cost cost;
};

struct RAREFY_API ModuleCost {
  std::string module;                 // path; empty for the whole model
  int64_t operators = 0;              // that ran in it and in the modules inside of it
  Cost cost;                          // of those; parameters by their names, whether an operator read them or not
  std::vector<int64_t> output_sizes;  // of the last operator's result
};

struct RAREFY_API Costs {
  Cost total;                           // all parameters of the model count, read or not
  std::vector<OperatorCost> operators;  // in the order of the schedule
  std::vector<ModuleCost>
      modules;                     // the model, and below each module those inside of it, in the order of their running
  std::vector<int64_t> uncounted;  // operators whose work is not known and that count with 0
  std::vector<std::string> names;  // of `operators`, to print

  /// A table with one line per module, or per operator, and a line for what is not counted.
  std::string to_string(bool by_operator = false) const;
  std::string to_html(bool by_operator = false) const;
};

/// Counts a recording. An operator that the counts do not know has those of what ran inside of it.
RAREFY_API Costs count_costs(const Graph& graph);

}  // namespace rarefy::graph
