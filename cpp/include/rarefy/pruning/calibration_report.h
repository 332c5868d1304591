#pragma once

#include <rarefy/export.h>
#include <rarefy/pruning/report.h>

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

namespace rarefy::pruning {

/// One weight that was pruned with calibration data.
struct RAREFY_API CalibratedTensor {
  std::string name;
  std::vector<int64_t> shape;
  int64_t elements = 0;
  int64_t pruned = 0;
  std::optional<double> error;  // ||(W - W') X||^2 / ||W X||^2; unset when no Hessian was gathered
  double damping = 0;           // as a fraction of the mean of the Hessian's diagonal; 0 when there was none
  int64_t samples = 0;          // inputs seen: rows of input_rows()
  int64_t skipped = 0;          // batches with NaN or infinity, left out
  double seconds = 0;           // of choosing and solving, without running the model
  std::string note;             // what is worth knowing

  /// pruned / elements.
  double sparsity() const;
};

/// What a calibrated method did to each weight, and what was left alone and why.
struct RAREFY_API CalibrationReport {
  std::string method;  // "sparse_gpt, 2:4, refit"
  std::vector<CalibratedTensor> tensors;
  std::vector<LeftAlone> left_alone;
  double seconds = 0;      // in all, with the runs of the model
  int64_t peak_bytes = 0;  // the most that statistics and copies of weights held at once

  int64_t elements() const;
  int64_t pruned() const;
  double sparsity() const;
  /// A table with one line per weight, a total, and what was left alone.
  std::string to_string() const;
  /// The same as an HTML table.
  std::string to_html() const;
};

}  // namespace rarefy::pruning
