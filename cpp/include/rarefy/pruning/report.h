#pragma once

#include <rarefy/export.h>

#include <cstdint>
#include <string>
#include <vector>

namespace rarefy::pruning {

/// One pruned parameter.
struct RAREFY_API PrunedTensor {
  std::string name;
  std::vector<int64_t> shape;
  int64_t elements = 0;
  int64_t zeros = 0;   // values that are zero
  int64_t pruned = 0;  // values that the mask holds at zero
  std::string note;    // what is worth knowing: too small to prune, pruned entirely, pruned values that are not zero

  /// zeros / elements; 0 for an empty tensor.
  double sparsity() const;
};

/// One parameter that the pruner does not touch, and why.
struct RAREFY_API LeftAlone {
  std::string name;
  int64_t elements = 0;
  std::string reason;
};

/// What was pruned, what was left alone, and why.
struct RAREFY_API PruningReport {
  std::vector<PrunedTensor> tensors;
  std::vector<LeftAlone> left_alone;
  double target = 0;  // the final sparsity that was asked for
  int64_t step = 0;   // pruner steps taken
  bool finalized = false;

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
