#include <pybind11/functional.h>
#include <pybind11/stl.h>
#include <rarefy/distillation/trainer.h>
#include <torch/csrc/utils/pybind.h>

#include <cmath>
#include <map>
#include <string>
#include <tuple>
#include <utility>

#include "bindings.h"

namespace rarefy::python {
namespace {

using namespace rarefy::distillation;  // NOLINT(google-build-using-namespace)
using torch::Tensor;

// The loop runs without the GIL, and holds Python's objects meanwhile: batches, outputs and functions. Each is counted once
// for Python, behind a pointer that needs no GIL to be copied and takes it for the end.
std::shared_ptr<void> hold(py::object object) {
  return {new py::object(std::move(object)), [](void* held) {
            const py::gil_scoped_acquire gil;
            delete static_cast<py::object*>(held);
          }};
}
const py::object& held(const std::shared_ptr<void>& holder) { return *static_cast<const py::object*>(holder.get()); }

/// A Python function of (student outputs, teacher outputs, batch) to a tensor.
LossTerm::Function to_function(py::object function) {
  return [function = hold(std::move(function))](const Outputs& student, const Outputs& teacher, const Batch& batch) {
    const py::gil_scoped_acquire gil;
    return held(function)(held(student.object), held(teacher.object), held(batch.object)).cast<Tensor>();
  };
}

/// What Python makes of a batch: (batch, its first tensor or None, its labels or None).
Batch to_batch(const py::object& batch) {
  auto [object, inputs, labels] = batch.cast<std::tuple<py::object, std::optional<Tensor>, std::optional<Tensor>>>();
  return {inputs.value_or(Tensor()), labels.value_or(Tensor()), {}, hold(std::move(object))};
}

/// A Python source yields batches, and None at the end of an epoch.
BatchSource to_source(const py::object& next) {
  if (next.is_none()) {
    return {};
  }
  return [next = hold(next)]() -> std::optional<Batch> {
    const py::gil_scoped_acquire gil;
    const py::object batch = held(next)();
    return batch.is_none() ? std::nullopt : std::optional<Batch>(to_batch(batch));
  };
}

/// A way back that runs also while a Python error is on its way out: the autograd engine leaves that error set in the
/// interpreter, where no Python code may run before it is put aside.
Model::Restore to_restore(Model::Restore restore) {
  return [restore = std::move(restore)] {
    const py::gil_scoped_acquire gil;
    const py::error_scope pending;
    restore();
  };
}

/// forward: a Python function of a batch to (outputs, logits or None).
Model to_model(const py::object& forward, std::function<Model::Restore(bool)> enter_mode,
               std::function<Model::Restore()> capture,
               std::function<std::vector<std::pair<std::string, Tensor>>()> tensors,
               std::function<Model::Restore()> pause_sync, std::function<void()> after_step) {
  Model model;
  model.forward = [forward = hold(forward)](const Batch& batch) {
    const py::gil_scoped_acquire gil;
    auto [object, logits] = held(forward)(held(batch.object)).cast<std::pair<py::object, std::optional<Tensor>>>();
    return Outputs(logits.value_or(Tensor()), {}, hold(std::move(object)));
  };
  if (enter_mode) {
    model.enter_mode = [enter_mode = std::move(enter_mode)](bool training) { return to_restore(enter_mode(training)); };
  }
  if (capture) {
    model.capture = [capture = std::move(capture)] { return to_restore(capture()); };
  }
  if (pause_sync) {
    model.pause_sync = [pause_sync = std::move(pause_sync)] { return to_restore(pause_sync()); };
  }
  model.tensors = std::move(tensors);
  model.after_step = std::move(after_step);
  return model;
}

using TermTuple = std::tuple<std::string, double, py::object, std::vector<std::tuple<std::string, double, py::object>>>;

Objective to_objective(const std::vector<TermTuple>& tuples) {
  std::vector<LossTerm> terms;
  for (const auto& [name, weight, function, parts] : tuples) {
    LossTerm term{name, weight, to_function(function)};
    for (const auto& [part_name, part_weight, part] : parts) {
      term.parts.push_back({part_name, part_weight, to_function(part)});
    }
    terms.push_back(std::move(term));
  }
  return terms;
}

Precision to_precision(const std::string& name) {
  if (name == "fp32") {
    return Precision::float32;
  }
  if (name == "bf16") {
    return Precision::bfloat16;
  }
  TORCH_CHECK_VALUE(name == "fp16", "[DistillationTrainer] precision must be 'fp32', 'bf16' or 'fp16', got '", name,
                    "'");
  return Precision::float16;
}

bool same(double a, double b) { return a == b || (std::isnan(a) && std::isnan(b)); }

bool same(const Evaluation& a, const Evaluation& b) {
  return same(a.loss, b.loss) && a.accuracy == b.accuracy && a.metrics == b.metrics;
}

bool same(const EpochMetrics& a, const EpochMetrics& b) {
  const bool evaluations = a.evaluation.has_value() && b.evaluation.has_value()
                               ? same(*a.evaluation, *b.evaluation)
                               : a.evaluation.has_value() == b.evaluation.has_value();
  return a.epoch == b.epoch && a.step == b.step && same(a.loss, b.loss) && evaluations;
}

std::string number(double value) { return py::str("{:.6g}").format(value); }

std::string repr(const Evaluation& evaluation) {
  std::string text =
      "Evaluation(loss=" + number(evaluation.loss) + ", accuracy=" +
      (evaluation.accuracy.has_value() ? std::string(py::str("{:.4f}").format(*evaluation.accuracy)) : "None");
  for (const auto& [name, value] : evaluation.metrics) {
    text += ", " + name + "=" + number(value);
  }
  return text + ")";
}

std::string repr(const EpochMetrics& metrics) {
  return "EpochMetrics(epoch=" + std::to_string(metrics.epoch) + ", step=" + std::to_string(metrics.step) +
         ", loss=" + number(metrics.loss) +
         ", evaluation=" + (metrics.evaluation.has_value() ? repr(*metrics.evaluation) : "None") + ")";
}

std::string repr(const StepResult& result) {
  std::string text = "StepResult(loss=" + number(result.loss);
  const auto add = [&text](const char* title, const std::vector<std::pair<std::string, double>>& values) {
    if (values.size() > 1) {
      text += std::string(", ") + title + "={";
      for (size_t i = 0; i < values.size(); ++i) {
        text += (i == 0 ? "" : ", ") + values[i].first + ": " + number(values[i].second);
      }
      text += "}";
    }
  };
  add("terms", result.terms);
  add("shares", result.shares);
  if (result.grad_norm.has_value()) {
    text += ", grad_norm=" + number(*result.grad_norm);
  }
  return text + (result.skipped ? ", skipped=True)" : ")");
}

py::dict to_dict(const std::vector<std::pair<std::string, double>>& values) {
  py::dict all;
  for (const auto& [name, value] : values) {
    all[py::str(name)] = value;
  }
  return all;
}

std::vector<std::pair<std::string, double>> from_dict(const py::dict& values) {
  std::vector<std::pair<std::string, double>> all;
  for (const auto& [name, value] : values) {
    all.emplace_back(name.cast<std::string>(), value.cast<double>());
  }
  return all;
}

void define_results(py::module_& sub) {
  py::class_<StepResult>(
      sub, "StepResult",
      "What one step reports: its loss before the step, each term before its weight, and, where they "
      "were measured, the terms' shares of the gradient and the gradient's norm.")
      .def(py::init([](int64_t step, double loss, const py::dict& terms, const py::dict& shares,
                       std::optional<double> grad_norm, bool skipped) {
             return StepResult{step, loss, from_dict(terms), from_dict(shares), grad_norm, skipped};
           }),
           py::arg("step"), py::arg("loss"), py::arg("terms"), py::arg("shares"), py::arg("grad_norm"),
           py::arg("skipped"))
      .def_readonly("step", &StepResult::step)
      .def_readonly("loss", &StepResult::loss)
      .def_property_readonly("terms", [](const StepResult& r) { return to_dict(r.terms); })
      .def_property_readonly("shares", [](const StepResult& r) { return to_dict(r.shares); })
      .def_readonly("grad_norm", &StepResult::grad_norm)
      .def_readonly("skipped", &StepResult::skipped)
      .def("__repr__", [](const StepResult& r) { return repr(r); });

  py::class_<Evaluation>(sub, "Evaluation",
                         "Loss and accuracy of the student, and metrics of one's own; accuracy is None without labels.")
      .def(py::init([](double loss, std::optional<double> accuracy, std::map<std::string, double> metrics) {
             return Evaluation{loss, accuracy, std::move(metrics)};
           }),
           py::arg("loss"), py::arg("accuracy") = py::none(), py::arg("metrics") = py::dict())
      .def_readonly("loss", &Evaluation::loss)
      .def_readonly("accuracy", &Evaluation::accuracy)
      .def_readonly("metrics", &Evaluation::metrics)
      .def("__eq__", [](const Evaluation& a, const Evaluation& b) { return same(a, b); })
      .def("__repr__", [](const Evaluation& e) { return repr(e); });

  py::class_<EpochMetrics>(sub, "EpochMetrics",
                           "One epoch: its number (from 1), steps since the start, mean loss, evaluation or None.")
      .def(py::init([](int64_t epoch, int64_t step, double loss, std::optional<Evaluation> evaluation) {
             return EpochMetrics{epoch, step, loss, std::move(evaluation)};
           }),
           py::arg("epoch"), py::arg("step"), py::arg("loss"), py::arg("evaluation") = py::none())
      .def_readonly("epoch", &EpochMetrics::epoch)
      .def_readonly("step", &EpochMetrics::step)
      .def_readonly("loss", &EpochMetrics::loss)
      .def_readonly("evaluation", &EpochMetrics::evaluation)
      .def("__eq__", [](const EpochMetrics& a, const EpochMetrics& b) { return same(a, b); })
      .def("__repr__", [](const EpochMetrics& e) { return repr(e); });

  py::class_<TrainerState>(sub, "TrainerState", "Where training stands, between two steps.")
      .def(py::init<>())
      .def_readwrite("epoch", &TrainerState::epoch)
      .def_readwrite("step", &TrainerState::step)
      .def_readwrite("history", &TrainerState::history)
      .def_readwrite("batch", &TrainerState::batch)
      .def_readwrite("epoch_loss", &TrainerState::epoch_loss)
      .def_readwrite("epoch_steps", &TrainerState::epoch_steps)
      .def_readwrite("best_epoch", &TrainerState::best_epoch)
      .def_readwrite("best_value", &TrainerState::best_value)
      .def_readwrite("loss_scale", &TrainerState::loss_scale)
      .def_readwrite("good_steps", &TrainerState::good_steps)
      .def_readwrite("advances", &TrainerState::advances)
      .def_readwrite("random", &TrainerState::random)
      .def_readwrite("epoch_random", &TrainerState::epoch_random)
      .def_readwrite("log", &TrainerState::log);
}

}  // namespace

void init_distillation_trainer(py::module_& sub) {
  define_results(sub);

  // The loop runs without the GIL: the functions below take it for as long as they are in Python, and the autograd engine
  // is entered without it.
  using release = py::call_guard<py::gil_scoped_release>;
  sub.def("fingerprint", &fingerprint, py::arg("tensors"), release());
  py::class_<Model>(sub, "Model", "A model as the loop sees it.")
      .def(py::init(&to_model), py::arg("forward"), py::arg("enter_mode") = py::none(), py::arg("capture") = py::none(),
           py::arg("tensors") = py::none(), py::arg("pause_sync") = py::none(), py::arg("after_step") = py::none());
  py::class_<DistillationTrainer>(sub, "DistillationTrainer",
                                  "The training loop; rarefy.distillation.DistillationTrainer drives it.")
      .def(py::init([](const Model& student, const Model& teacher, std::function<void()> zero_grad,
                       std::function<void()> step, std::function<std::vector<Tensor>()> parameters,
                       const std::vector<TermTuple>& terms, std::function<void(std::optional<double>)> scheduler,
                       bool schedule_epochs, double max_grad_norm, int64_t ignore_index, int64_t accumulate,
                       const std::string& precision, const std::string& device, int64_t log_every, bool shift,
                       const std::string& metric, bool maximize, double min_delta, int64_t patience,
                       const py::object& row_weights, const py::object& count, const py::object& prepare,
                       std::function<void(Tensor)> all_reduce_sum, int64_t processes,
                       std::function<std::vector<Tensor>()> capture_random,
                       std::function<void(std::vector<Tensor>)> restore_random) {
             DistillationTrainerOptions options{max_grad_norm,
                                                ignore_index,
                                                accumulate,
                                                to_precision(precision),
                                                c10::Device(device).type(),
                                                log_every,
                                                shift,
                                                {metric, maximize, min_delta, patience}};
             if (!row_weights.is_none()) {
               options.row_weights = [weights = hold(row_weights)](const Batch& batch) {
                 const py::gil_scoped_acquire gil;
                 return held(weights)(held(batch.object)).cast<Tensor>();
               };
             }
             if (!count.is_none()) {
               options.count = [count = hold(count)](const Batch& batch) {
                 const py::gil_scoped_acquire gil;
                 return held(count)(held(batch.object)).cast<double>();
               };
             }
             if (!prepare.is_none()) {
               options.prepare = [prepare = hold(prepare)](const Batch& batch) {
                 const py::gil_scoped_acquire gil;
                 return to_batch(held(prepare)(held(batch.object)));
               };
             }
             if (all_reduce_sum) {
               options.all_reduce_sum = [reduce = std::move(all_reduce_sum)](Tensor& values) { reduce(values); };
             }
             options.processes = processes;
             options.random.capture = std::move(capture_random);
             options.random.restore = std::move(restore_random);
             using When = SchedulerInterface::When;
             return DistillationTrainer(
                 student, teacher, OptimizerInterface(std::move(zero_grad), std::move(step), std::move(parameters)),
                 to_objective(terms), std::move(options),
                 SchedulerInterface(std::move(scheduler), schedule_epochs ? When::epoch : When::step));
           }),
           py::kw_only(), py::arg("student"), py::arg("teacher"), py::arg("zero_grad"), py::arg("step"),
           py::arg("parameters"), py::arg("terms"), py::arg("scheduler"), py::arg("schedule_epochs"),
           py::arg("max_grad_norm"), py::arg("ignore_index"), py::arg("accumulate"), py::arg("precision"),
           py::arg("device"), py::arg("log_every"), py::arg("shift"), py::arg("metric"), py::arg("maximize"),
           py::arg("min_delta"), py::arg("patience"), py::arg("row_weights"), py::arg("count"), py::arg("prepare"),
           py::arg("all_reduce_sum"), py::arg("processes"), py::arg("capture_random"), py::arg("restore_random"))
      .def(
          "train_step",
          [](DistillationTrainer& trainer, const py::object& source) {
            const auto next = to_source(source);
            const py::gil_scoped_release no_gil;
            return trainer.train_step(*next());
          },
          py::arg("source"))
      .def(
          "fit",
          [](DistillationTrainer& trainer, const py::object& next_batch, int64_t epochs,
             std::function<void(int64_t, double)> on_step,
             std::function<void(int64_t, const EpochMetrics&)> on_epoch_end,
             std::function<std::map<std::string, double>()> measure, const py::object& evaluation) {
            const auto batches = to_source(next_batch), evaluated = to_source(evaluation);
            const Callbacks callbacks{std::move(on_step), std::move(on_epoch_end), std::move(measure)};
            const py::gil_scoped_release no_gil;
            trainer.fit(batches, epochs, callbacks, evaluated);
          },
          py::arg("next_batch"), py::arg("epochs"), py::arg("on_step"), py::arg("on_epoch_end"), py::arg("measure"),
          py::arg("evaluation"))
      .def(
          "evaluate",
          [](DistillationTrainer& trainer, const py::object& next_batch) {
            const auto batches = to_source(next_batch);
            const py::gil_scoped_release no_gil;
            return trainer.evaluate(batches);
          },
          py::arg("next_batch"))
      .def("stop", &DistillationTrainer::stop)
      .def_property_readonly("epoch", &DistillationTrainer::epoch)
      .def_property_readonly("step", &DistillationTrainer::step)
      .def_property_readonly("best_epoch", &DistillationTrainer::best_epoch)
      .def_property_readonly("history", &DistillationTrainer::history)
      .def_property_readonly("log", &DistillationTrainer::log)
      .def_property_readonly("last", &DistillationTrainer::last)
      .def("out_of_patience", &DistillationTrainer::out_of_patience)
      .def(
          "teacher_fingerprint", [](const DistillationTrainer& trainer) { return trainer.teacher().fingerprint(); },
          release())
      .def("state", &DistillationTrainer::state, release())
      .def("load_state", &DistillationTrainer::load_state, py::arg("state"), release());
}

}  // namespace rarefy::python
