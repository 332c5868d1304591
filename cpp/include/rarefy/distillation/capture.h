#pragma once

#include <rarefy/export.h>
#include <torch/types.h>

#include <map>
#include <string>
#include <vector>

namespace rarefy::distillation {

/// Tensors by name.
using TensorMap = std::map<std::string, torch::Tensor>;

/// Returns `tensor` as it is and, where a Capture is active on this thread, records it there under `name`. The place of a
/// call is inside of a model's forward; without a Capture it costs a look at one thread-local pointer.
///
///   torch::Tensor forward(torch::Tensor x) { return head(tap("trunk", torch::relu(trunk(x)))); }
///
/// What is recorded is the tensor itself with its gradient history: an operator that later writes into it in place changes
/// the record too. Throws c10::ValueError when the name has been recorded since the last take(): give each call a name.
RAREFY_API torch::Tensor tap(const std::string& name, torch::Tensor tensor);

/// Records what tap() sees on the thread that made it, while it lives. Where several live, the youngest alone records, so
/// that a teacher's run inside of a student's keeps to itself.
class RAREFY_API Capture {
 public:
  /// Records every name.
  Capture();
  /// Records these names alone. Throws c10::ValueError for an empty list or an empty name.
  explicit Capture(std::vector<std::string> names);
  ~Capture();
  Capture(const Capture&) = delete;
  Capture& operator=(const Capture&) = delete;
  Capture(Capture&&) = delete;
  Capture& operator=(Capture&&) = delete;

  /// What has been recorded since the last take().
  const TensorMap& features() const { return features_; }

  /// Gives the records of one forward away and starts anew. Throws c10::ValueError when a name that was asked for is not
  /// among them, and keeps them then.
  TensorMap take();

 private:
  friend torch::Tensor tap(const std::string& name, torch::Tensor tensor);
  void record(const std::string& name, const torch::Tensor& tensor);

  std::vector<std::string> names_;  // sorted; empty: all
  TensorMap features_;
  Capture* outer_ = nullptr;
};

}  // namespace rarefy::distillation
