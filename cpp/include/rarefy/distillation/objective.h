#pragma once

#include <rarefy/distillation/model.h>
#include <rarefy/export.h>
#include <torch/types.h>

#include <concepts>
#include <functional>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

namespace rarefy::distillation {

/// One addend of the objective: weight * function(student, teacher, batch), a scalar averaged over the batch.
struct LossTerm {
  using Function = std::function<torch::Tensor(const Outputs& student, const Outputs& teacher, const Batch& batch)>;

  std::string name;
  double weight;
  Function function;
  /// What the function is a sum of, each with its own weight, to measure where its gradient comes from; may be empty.
  std::vector<LossTerm> parts = {};
};

/// What a student is trained on: the sum of its terms. A function (student logits, teacher logits, labels) to a scalar, such
/// as a DistillationLoss, is an objective of one term, "loss".
class RAREFY_API Objective {
 public:
  /// Throws c10::ValueError without terms, for two of one name, an empty name, or a weight that is not finite.
  Objective(std::vector<LossTerm> terms);  // NOLINT(google-explicit-constructor)

  template <typename F>
    requires(!std::same_as<std::remove_cvref_t<F>, Objective> &&
             std::is_invocable_r_v<torch::Tensor, F&, const torch::Tensor&, const torch::Tensor&, const torch::Tensor&>)
  Objective(F loss)  // NOLINT(google-explicit-constructor)
      : Objective(std::vector<LossTerm>{{"loss", 1.0,
                                         [loss = std::move(loss)](const Outputs& student, const Outputs& teacher,
                                                                  const Batch& batch) mutable -> torch::Tensor {
                                           return loss(student.logits, teacher.logits, batch.labels);
                                         }}}) {}

  const std::vector<LossTerm>& terms() const { return terms_; }

 private:
  std::vector<LossTerm> terms_;
};

}  // namespace rarefy::distillation
