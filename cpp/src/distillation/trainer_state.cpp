#include <ATen/ops/empty.h>
#include <c10/util/Exception.h>
#include <rarefy/distillation/trainer.h>

#include <limits>
#include <utility>

namespace rarefy::distillation {
namespace {

// Columns of the history as a float64 table; NaN where a value is unset.
enum Column : int64_t { kEpoch, kStep, kLoss, kHasEvaluation, kEvaluationLoss, kHasAccuracy, kAccuracy, kColumns };

}  // namespace

void TrainerState::validate() const {
  TORCH_CHECK_VALUE(epoch >= 0 && step >= 0,
                    "[DistillationTrainer] a state's epoch and step must be 0 or more, got epoch ", epoch, " and step ",
                    step);
  TORCH_CHECK_VALUE(static_cast<int64_t>(history.size()) == epoch,
                    "[DistillationTrainer] a state's history must have one entry per epoch, got ", history.size(),
                    " entries for ", epoch, " epochs");
}

torch::serialize::OutputArchive& operator<<(torch::serialize::OutputArchive& archive, const TrainerState& state) {
  constexpr double unset = std::numeric_limits<double>::quiet_NaN();
  const auto entries = static_cast<int64_t>(state.history.size());
  auto table = at::empty({entries, kColumns}, at::kDouble);
  auto* row = table.data_ptr<double>();
  for (const auto& entry : state.history) {
    const auto& evaluation = entry.evaluation;
    const auto accuracy = evaluation.has_value() ? evaluation->accuracy : std::nullopt;
    row[kEpoch] = static_cast<double>(entry.epoch);
    row[kStep] = static_cast<double>(entry.step);
    row[kLoss] = entry.loss;
    row[kHasEvaluation] = evaluation.has_value() ? 1.0 : 0.0;
    row[kEvaluationLoss] = evaluation.has_value() ? evaluation->loss : unset;
    row[kHasAccuracy] = accuracy.has_value() ? 1.0 : 0.0;
    row[kAccuracy] = accuracy.value_or(unset);
    row += kColumns;
  }
  archive.write("epoch", c10::IValue(state.epoch));
  archive.write("step", c10::IValue(state.step));
  archive.write("history", table);
  return archive;
}

torch::serialize::InputArchive& operator>>(torch::serialize::InputArchive& archive, TrainerState& state) {
  c10::IValue epoch, step;
  at::Tensor table;
  archive.read("epoch", epoch);
  archive.read("step", step);
  archive.read("history", table);
  TORCH_CHECK_VALUE(table.dim() == 2 && table.size(1) == kColumns && table.scalar_type() == at::kDouble,
                    "[DistillationTrainer] a saved history must be a float64 table of ", static_cast<int64_t>(kColumns),
                    " columns, got ", table.scalar_type(), " ", table.sizes());
  TrainerState loaded{epoch.toInt(), step.toInt(), {}};
  const auto dense = table.contiguous();
  const auto* row = dense.const_data_ptr<double>();
  for (int64_t i = 0; i < dense.size(0); ++i, row += kColumns) {
    EpochMetrics entry{static_cast<int64_t>(row[kEpoch]), static_cast<int64_t>(row[kStep]), row[kLoss], std::nullopt};
    if (row[kHasEvaluation] != 0.0) {
      entry.evaluation = Evaluation{row[kEvaluationLoss], std::nullopt};
      if (row[kHasAccuracy] != 0.0) {
        entry.evaluation->accuracy = row[kAccuracy];
      }
    }
    loaded.history.push_back(entry);
  }
  loaded.validate();
  state = std::move(loaded);
  return archive;
}

}  // namespace rarefy::distillation
