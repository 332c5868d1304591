#pragma once

#include <ATen/core/Tensor.h>
#include <rarefy/export.h>
#include <rarefy/pruning/choice.h>
#include <rarefy/pruning/structure.h>

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

namespace rarefy::pruning {

/// What a constant of removed channels adds to a parameter or buffer of their consumer.
struct RAREFY_API Fold {
  std::string tensor;    // a bias, or the running mean of the batch norm behind a convolution without one
  std::string weight;    // of the consumer
  int64_t channels = 0;  // removed channels with a constant that is not zero
  at::Tensor delta;      // one element per channel of the tensor before the cut, to be added
};

/// A size in the arguments of an operator that must change with the model: a view by num_heads, a split by width.
struct RAREFY_API Resize {
  int64_t node = -1;
  std::string module;  // that called the operator
  std::string source;
  int64_t before = 0;
  int64_t after = 0;
  bool flows = true;  // false: nothing of what is removed flows through the operator, whose sizes stay
};

/// What structural pruning did, or would do.
struct RAREFY_API StructuredReport {
  std::string asked;    // "macs 0.5", "latency 10 ms"
  double achieved = 0;  // in the unit of what was asked
  Counts before;        // the model before the first step
  Counts after;
  std::vector<GroupOutcome> groups;
  std::vector<Pinned> pinned;
  std::vector<Cut> cuts;  // what is left of each dimension that lost slices in this step
  std::vector<Fold> folds;
  std::vector<std::string> notes;  // operators that were pinned on the way, and other things worth knowing
  double difference = 0;  // largest, of the pruned model's outputs and the reference's, over the largest output
  int64_t attempts = 0;   // cuts that were tried
  int64_t step = 0, steps = 1;
  bool pruned = false;                                 // false for a preview
  double latency_before_ms = 0, latency_after_ms = 0;  // 0: not measured

  /// Asked against achieved, one line per group, what stays and why.
  std::string to_string() const;
  std::string to_html() const;
};

}  // namespace rarefy::pruning
