#pragma once

#include <rarefy/distillation/loss.h>
#include <rarefy/ops/linear_distillation_loss.h>

namespace rarefy::distillation {

/// The distillation loss of two linear heads, from the hidden states below them: logits are made and used in chunks of rows and
/// never exist whole (rarefy/ops/linear_distillation_loss.h). It holds no parameters: the heads stay where they are.
class RAREFY_API LinearDistillationLossImpl : public torch::nn::Cloneable<LinearDistillationLossImpl> {
 public:
  /// Throws c10::ValueError for options out of range; reduction is "mean" or "sum".
  explicit LinearDistillationLossImpl(const DistillationLossOptions& options = {});

  /// Hidden states [..., size] and the heads' weights [classes, size] and biases to a scalar. Labels, row weights and a bool
  /// mask [...] (true counts) may be undefined. No gradient flows to the teacher. The student's hidden states must be finite
  /// in masked rows too: they are factors of the weight's gradient.
  torch::Tensor forward(const ops::LinearHead& student, const ops::LinearHead& teacher,
                        const torch::Tensor& labels = {}, const torch::Tensor& row_weights = {},
                        const torch::Tensor& mask = {});

  const DistillationLossOptions& options() const { return options_; }
  void reset() override;
  void pretty_print(std::ostream& stream) const override;

 private:
  DistillationLossOptions options_;
};
TORCH_MODULE(LinearDistillationLoss);

}  // namespace rarefy::distillation
