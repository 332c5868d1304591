#pragma once

#include <rarefy/export.h>

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

namespace rarefy::pruning {

/// One pruned parameter.
struct RAREFY_API PrunedTensor {
  std::string name;
  std::vector<int64_t> shape;
  int64_t elements = 0;
  int64_t zeros = 0;        // values that are zero
  int64_t pruned = 0;       // values that the mask holds at zero
  bool has_pattern = true;  // the mask has the pattern that was asked for
  std::string note;  // what is worth knowing: too small to prune, pruned entirely, pruned values that are not zero

  /// zeros / elements; 0 for an empty tensor.
  double sparsity() const;
};

/// One parameter that the pruner does not touch, and why.
struct RAREFY_API LeftAlone {
  std::string name;
  int64_t elements = 0;
  std::string reason;
};

/// What a pruned model costs beside the dense one; unset where it was not measured.
struct RAREFY_API PruningCost {
  std::optional<int64_t> dense_bytes;   // of the model in a file
  std::optional<int64_t> bytes;         // the same with zeros left out
  std::optional<int64_t> dense_macs;    // of one forward pass
  std::optional<int64_t> macs;          // those whose weight is not zero
  std::optional<double> dense_seconds;  // of one forward pass
  std::optional<double> seconds;        // the same as it would be run
};

/// What was pruned, what was left alone, and why.
struct RAREFY_API PruningReport {
  std::vector<PrunedTensor> tensors;
  std::vector<LeftAlone> left_alone;
  double target = 0;  // the final sparsity that was asked for
  int64_t step = 0;   // pruner steps taken
  bool finalized = false;
  std::string pattern = "unstructured";  // see short_name()
  PruningCost cost = {};                 // for measurements to fill in

  int64_t elements() const;
  int64_t zeros() const;
  int64_t pruned() const;
  double sparsity() const;
  /// A table with one line per tensor, a total, and what was left alone.
  std::string to_string() const;
  /// The same as an HTML table.
  std::string to_html() const;
};

}  // namespace rarefy::pruning
