#include <pybind11/functional.h>
#include <pybind11/stl.h>
#include <rarefy/distillation/loss.h>
#include <rarefy/distillation/trainer.h>
#include <torch/csrc/utils/pybind.h>

#include <utility>

#include "bindings.h"

namespace rarefy::python {
namespace {

using namespace rarefy::distillation;  // NOLINT(google-build-using-namespace)
using torch::Tensor;

/// A Python source yields (inputs, labels or None), and None at the end of an epoch.
using PythonSource = std::function<std::optional<std::pair<Tensor, std::optional<Tensor>>>()>;
using Mode = std::function<Model::Restore(bool)>;

BatchSource to_source(PythonSource next) {
  if (!next) {
    return {};
  }
  return [next = std::move(next)]() -> std::optional<Batch> {
    auto batch = next();
    if (!batch.has_value()) {
      return std::nullopt;
    }
    return Batch{std::move(batch->first), batch->second.value_or(Tensor())};
  };
}

/// A mode switch whose way back runs also while a Python error is on its way out: the autograd engine leaves that error set
/// in the interpreter, where no Python code may run before it is put aside.
Mode to_mode(Mode enter) {
  if (!enter) {
    return {};
  }
  return [enter = std::move(enter)](bool training) -> Model::Restore {
    return [restore = enter(training)] {
      const py::gil_scoped_acquire gil;
      const py::error_scope pending;
      restore();
    };
  };
}

py::object optional_object(const std::optional<double>& value) {
  return value.has_value() ? py::object(py::float_(*value)) : py::object(py::none());
}

py::str repr(const Evaluation& evaluation) {
  return py::str("Evaluation(loss={:.6g}, accuracy={})")
      .format(evaluation.loss, evaluation.accuracy.has_value()
                                   ? py::object(py::str("{:.4f}").format(*evaluation.accuracy))
                                   : py::object(py::none()));
}

py::str repr(const EpochMetrics& metrics) {
  return py::str("EpochMetrics(epoch={}, step={}, loss={:.6g}, evaluation={})")
      .format(metrics.epoch, metrics.step, metrics.loss,
              metrics.evaluation.has_value() ? py::object(repr(*metrics.evaluation)) : py::object(py::none()));
}

}  // namespace

void init_distillation(py::module_& m) {
  auto sub = m.def_submodule("distillation", "Distillation loss options and the trainer's loop.");

  py::class_<DistillationLossOptions>(sub, "DistillationLossOptions")
      .def(py::init([](double temperature, double alpha, std::string divergence, double skew, double label_smoothing,
                       int64_t ignore_index, std::string reduction) {
             return DistillationLossOptions{temperature,     alpha,        std::move(divergence), skew,
                                            label_smoothing, ignore_index, std::move(reduction)};
           }),
           py::kw_only(), py::arg("temperature"), py::arg("alpha"), py::arg("divergence"), py::arg("skew"),
           py::arg("label_smoothing"), py::arg("ignore_index"), py::arg("reduction"))
      .def("validate", &DistillationLossOptions::validate, "Raise ValueError for a field out of range.");

  py::class_<StepResult>(sub, "StepResult", "What one training step reports: its loss, before the step.")
      .def_readonly("loss", &StepResult::loss)
      .def("__repr__", [](const StepResult& r) { return py::str("StepResult(loss={:.6g})").format(r.loss); });

  py::class_<Evaluation>(sub, "Evaluation", "Loss and accuracy of the student; accuracy is None without class labels.")
      .def(py::init([](double loss, std::optional<double> accuracy) { return Evaluation{loss, accuracy}; }),
           py::arg("loss"), py::arg("accuracy") = py::none())
      .def_readonly("loss", &Evaluation::loss)
      .def_property_readonly("accuracy", [](const Evaluation& e) { return optional_object(e.accuracy); })
      .def("__eq__",
           [](const Evaluation& a, const Evaluation& b) { return a.loss == b.loss && a.accuracy == b.accuracy; })
      .def("__repr__", [](const Evaluation& e) { return repr(e); });

  py::class_<EpochMetrics>(sub, "EpochMetrics",
                           "One epoch: its number (from 1), steps since the start, mean loss, evaluation or None.")
      .def(py::init([](int64_t epoch, int64_t step, double loss, std::optional<Evaluation> evaluation) {
             return EpochMetrics{epoch, step, loss, evaluation};
           }),
           py::arg("epoch"), py::arg("step"), py::arg("loss"), py::arg("evaluation") = py::none())
      .def_readonly("epoch", &EpochMetrics::epoch)
      .def_readonly("step", &EpochMetrics::step)
      .def_readonly("loss", &EpochMetrics::loss)
      .def_property_readonly("evaluation", [](const EpochMetrics& e) { return e.evaluation; })
      .def("__eq__",
           [](const EpochMetrics& a, const EpochMetrics& b) {
             const bool same = a.evaluation.has_value() == b.evaluation.has_value() &&
                               (!a.evaluation.has_value() || (a.evaluation->loss == b.evaluation->loss &&
                                                              a.evaluation->accuracy == b.evaluation->accuracy));
             return same && a.epoch == b.epoch && a.step == b.step && a.loss == b.loss;
           })
      .def("__repr__", [](const EpochMetrics& e) { return repr(e); });

  // The loop runs without the GIL: the functions below take it for as long as they are in Python, and the autograd engine
  // is entered without it.
  using release = py::call_guard<py::gil_scoped_release>;
  py::class_<DistillationTrainer>(sub, "DistillationTrainer",
                                  "The training loop; rarefy.distillation.DistillationTrainer drives it.")
      .def(py::init([](Model::Forward student, Mode student_mode, Model::Forward teacher, Mode teacher_mode,
                       std::function<void()> zero_grad, std::function<void()> step,
                       std::function<std::vector<Tensor>()> parameters, LossFunction loss, double max_grad_norm,
                       int64_t ignore_index) {
             return DistillationTrainer(
                 Model(std::move(student), to_mode(std::move(student_mode))),
                 Model(std::move(teacher), to_mode(std::move(teacher_mode))),
                 OptimizerInterface(std::move(zero_grad), std::move(step), std::move(parameters)), std::move(loss),
                 DistillationTrainerOptions{max_grad_norm, ignore_index});
           }),
           py::arg("student"), py::arg("student_mode"), py::arg("teacher"), py::arg("teacher_mode"),
           py::arg("zero_grad"), py::arg("step"), py::arg("parameters"), py::arg("loss"), py::arg("max_grad_norm"),
           py::arg("ignore_index"))
      .def(
          "train_step",
          [](DistillationTrainer& trainer, const Tensor& inputs, const std::optional<Tensor>& labels) {
            return trainer.train_step(inputs, labels.value_or(Tensor()));
          },
          py::arg("inputs"), py::arg("labels"), release())
      .def(
          "fit",
          [](DistillationTrainer& trainer, PythonSource next_batch, int64_t epochs,
             std::function<void(int64_t, double)> on_step,
             std::function<void(int64_t, const EpochMetrics&)> on_epoch_end, PythonSource evaluation) {
            trainer.fit(to_source(std::move(next_batch)), epochs,
                        Callbacks{std::move(on_step), std::move(on_epoch_end)}, to_source(std::move(evaluation)));
          },
          py::arg("next_batch"), py::arg("epochs"), py::arg("on_step"), py::arg("on_epoch_end"), py::arg("evaluation"),
          release())
      .def(
          "evaluate",
          [](DistillationTrainer& trainer, PythonSource next_batch) {
            return trainer.evaluate(to_source(std::move(next_batch)));
          },
          py::arg("next_batch"), release())
      .def_property_readonly("epoch", [](const DistillationTrainer& trainer) { return trainer.state().epoch; })
      .def_property_readonly("step", [](const DistillationTrainer& trainer) { return trainer.state().step; })
      .def_property_readonly("history", [](const DistillationTrainer& trainer) { return trainer.history(); })
      .def(
          "load_state",
          [](DistillationTrainer& trainer, int64_t epoch, int64_t step, std::vector<EpochMetrics> history) {
            trainer.load_state(TrainerState{epoch, step, std::move(history)});
          },
          py::arg("epoch"), py::arg("step"), py::arg("history"));
}

}  // namespace rarefy::python
