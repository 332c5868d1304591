// The parts of a training step that evaluation shares.
#pragma once

#include <rarefy/distillation/objective.h>
#include <rarefy/distillation/trainer.h>

#include <string>
#include <utility>
#include <vector>

namespace rarefy::distillation {

struct TermSums {
  torch::Tensor total;                                 // weighed, differentiable
  double value;                                        // of total
  std::vector<std::pair<std::string, double>> values;  // of the terms, before their weights
  std::vector<torch::Tensor> terms;
};

/// Every term of the objective, and their weighed sum. Throws c10::ValueError for a term that is not one number.
TermSums sum_terms(const Objective& objective, const Outputs& student, const Outputs& teacher, const Batch& batch);

/// The weights of a batch's rows that labels and DistillationTrainerOptions::row_weights give, moved by `shift`; undefined
/// where neither tells.
torch::Tensor valid_rows(const DistillationTrainerOptions& options, const Batch& batch);

/// The number of valid rows of a batch, as DistillationTrainerOptions::count says.
double count_rows(const DistillationTrainerOptions& options, const Batch& batch, const Outputs& outputs = {});

}  // namespace rarefy::distillation
