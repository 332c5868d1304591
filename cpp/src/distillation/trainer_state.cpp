#include <c10/util/Exception.h>
#include <rarefy/distillation/trainer.h>

#include <utility>

namespace rarefy::distillation {
namespace {

using NamedNumbers = std::vector<std::pair<std::string, double>>;

// Numbers by name, as an archive's dictionary.
c10::IValue pack(const NamedNumbers& numbers) {
  c10::Dict<std::string, double> dictionary;
  for (const auto& [name, value] : numbers) {
    dictionary.insert(name, value);
  }
  return dictionary;
}

NamedNumbers unpack(const c10::IValue& value) {
  NamedNumbers numbers;
  for (const auto& item : value.toGenericDict()) {
    numbers.emplace_back(item.key().toStringRef(), item.value().toDouble());
  }
  return numbers;
}

c10::IValue optional(const std::optional<double>& value) {
  return value.has_value() ? c10::IValue(*value) : c10::IValue();
}

std::optional<double> to_optional(const c10::IValue& value) {
  return value.isNone() ? std::nullopt : std::optional<double>(value.toDouble());
}

c10::IValue pack(const EpochMetrics& entry) {
  c10::IValue evaluation;
  if (entry.evaluation.has_value()) {
    const NamedNumbers metrics(entry.evaluation->metrics.begin(), entry.evaluation->metrics.end());
    evaluation = c10::ivalue::Tuple::create(
        {c10::IValue(entry.evaluation->loss), optional(entry.evaluation->accuracy), pack(metrics)});
  }
  return c10::ivalue::Tuple::create({entry.epoch, entry.step, entry.loss, evaluation});
}

EpochMetrics unpack_metrics(const c10::IValue& value) {
  const auto fields = value.toTupleRef().elements().vec();
  EpochMetrics entry{fields[0].toInt(), fields[1].toInt(), fields[2].toDouble()};
  if (!fields[3].isNone()) {
    const auto evaluation = fields[3].toTupleRef().elements().vec();
    entry.evaluation = Evaluation{evaluation[0].toDouble(), to_optional(evaluation[1])};
    for (auto& [name, number] : unpack(evaluation[2])) {
      entry.evaluation->metrics.emplace(name, number);
    }
  }
  return entry;
}

c10::IValue pack(const StepResult& entry) {
  return c10::ivalue::Tuple::create(
      {entry.step, entry.loss, pack(entry.terms), pack(entry.shares), optional(entry.grad_norm), entry.skipped});
}

StepResult unpack_result(const c10::IValue& value) {
  const auto fields = value.toTupleRef().elements().vec();
  return {fields[0].toInt(), fields[1].toDouble(),   unpack(fields[2]),
          unpack(fields[3]), to_optional(fields[4]), fields[5].toBool()};
}

template <typename T>
c10::IValue pack_all(const std::vector<T>& entries) {
  std::vector<c10::IValue> all;
  for (const auto& entry : entries) {
    all.push_back(pack(entry));
  }
  return c10::ivalue::Tuple::create(std::move(all));
}

c10::IValue read(torch::serialize::InputArchive& archive, const std::string& name) {
  c10::IValue value;
  archive.read(name, value);
  return value;
}

}  // namespace

void TrainerState::validate() const {
  TORCH_CHECK_VALUE(epoch >= 0 && step >= 0,
                    "[DistillationTrainer] a state's epoch and step must be 0 or more, got epoch ", epoch, " and step ",
                    step);
  TORCH_CHECK_VALUE(static_cast<int64_t>(history.size()) == epoch,
                    "[DistillationTrainer] a state's history must have one entry per epoch, got ", history.size(),
                    " entries for ", epoch, " epochs");
  TORCH_CHECK_VALUE(batch >= 0 && epoch_steps >= 0 && good_steps >= 0 && best_epoch >= 0 && best_epoch <= epoch,
                    "[DistillationTrainer] a state's counts must be 0 or more and its best epoch one of the ", epoch,
                    " done, got batch ", batch, ", best epoch ", best_epoch);
  TORCH_CHECK_VALUE(loss_scale > 0.0, "[DistillationTrainer] a state's loss scale must be positive, got ", loss_scale);
  TORCH_CHECK_VALUE(batch == 0 || !epoch_random.empty(),
                    "[DistillationTrainer] a state within an epoch must hold the random state of its start, got none");
}

torch::serialize::OutputArchive& operator<<(torch::serialize::OutputArchive& archive, const TrainerState& state) {
  archive.write("epoch", c10::IValue(state.epoch));
  archive.write("step", c10::IValue(state.step));
  archive.write("history", pack_all(state.history));
  archive.write("batch", c10::IValue(state.batch));
  archive.write("epoch_loss", c10::IValue(state.epoch_loss));
  archive.write("epoch_steps", c10::IValue(state.epoch_steps));
  archive.write("best_epoch", c10::IValue(state.best_epoch));
  archive.write("best_value", c10::IValue(state.best_value));
  archive.write("loss_scale", c10::IValue(state.loss_scale));
  archive.write("good_steps", c10::IValue(state.good_steps));
  archive.write("advances", c10::IValue(state.advances));
  archive.write("random", c10::IValue(state.random));
  archive.write("epoch_random", c10::IValue(state.epoch_random));
  archive.write("log", pack_all(state.log));
  return archive;
}

torch::serialize::InputArchive& operator>>(torch::serialize::InputArchive& archive, TrainerState& state) {
  TrainerState loaded;
  loaded.epoch = read(archive, "epoch").toInt();
  loaded.step = read(archive, "step").toInt();
  const auto history = read(archive, "history");
  for (const auto& entry : history.toTupleRef().elements()) {
    loaded.history.push_back(unpack_metrics(entry));
  }
  loaded.batch = read(archive, "batch").toInt();
  loaded.epoch_loss = read(archive, "epoch_loss").toDouble();
  loaded.epoch_steps = read(archive, "epoch_steps").toInt();
  loaded.best_epoch = read(archive, "best_epoch").toInt();
  loaded.best_value = read(archive, "best_value").toDouble();
  loaded.loss_scale = read(archive, "loss_scale").toDouble();
  loaded.good_steps = read(archive, "good_steps").toInt();
  loaded.advances = read(archive, "advances").toInt();
  loaded.random = read(archive, "random").toTensorVector();
  loaded.epoch_random = read(archive, "epoch_random").toTensorVector();
  const auto log = read(archive, "log");
  for (const auto& entry : log.toTupleRef().elements()) {
    loaded.log.push_back(unpack_result(entry));
  }
  loaded.validate();
  state = std::move(loaded);
  return archive;
}

}  // namespace rarefy::distillation
