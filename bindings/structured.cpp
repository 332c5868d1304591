#include <pybind11/functional.h>
#include <rarefy/pruning/structured.h>

#include "bindings.h"

namespace rarefy::python {
namespace {

using namespace rarefy::pruning;

PrunableModel make_model(const std::function<std::pair<std::shared_ptr<graph::Graph>, std::string>(bool)>& record,
                         std::function<std::vector<graph::NamedTensor>()> tensors, const py::function& score,
                         std::function<void(const Plan&)> apply, std::function<void()> rollback,
                         std::function<void()> commit, std::function<void()> run) {
  PrunableModel model;
  model.record = [record](bool shapes_only) {
    auto [graph, failure] = record(shapes_only);
    return Recording{std::move(*graph), std::move(failure)};
  };
  model.tensors = std::move(tensors);
  model.score = [score](const Structure& structure) {
    return score(py::cast(structure, py::return_value_policy::reference)).cast<std::vector<GroupScore>>();
  };
  model.apply = std::move(apply);
  model.rollback = std::move(rollback);
  model.commit = std::move(commit);
  model.run = std::move(run);
  return model;
}

void init_report(py::module_& m) {
  py::class_<Fold>(m, "Fold", "What a constant of removed channels adds to a parameter of their consumer.")
      .def_readonly("tensor", &Fold::tensor, "A bias, or the running mean behind a convolution without one.")
      .def_readonly("weight", &Fold::weight, "Of the consumer.")
      .def_readonly("channels", &Fold::channels, "Removed channels with a constant that is not zero.")
      .def_readonly("delta", &Fold::delta, "One element per channel of the tensor before the cut.")
      .def("__repr__", [](const Fold& self) {
        return "Fold(tensor='" + self.tensor + "', weight='" + self.weight +
               "', channels=" + std::to_string(self.channels) + ")";
      });
  py::class_<Resize>(m, "Resize", "A size in the arguments of an operator that must change with the model.")
      .def_readonly("node", &Resize::node)
      .def_readonly("module", &Resize::module)
      .def_readonly("source", &Resize::source)
      .def_readonly("before", &Resize::before)
      .def_readonly("after", &Resize::after)
      .def_readonly("flows", &Resize::flows, "Whether what is removed flows through the operator.")
      .def("__repr__", [](const Resize& self) {
        return "Resize(module='" + self.module + "', source='" + self.source + "', " + std::to_string(self.before) +
               " -> " + std::to_string(self.after) + ")";
      });
  py::class_<Plan>(m, "Plan", "What is to be done to a model in one transaction.")
      .def_readonly("cuts", &Plan::cuts)
      .def_readonly("folds", &Plan::folds)
      .def_readonly("resizes", &Plan::resizes)
      .def_readonly("cautious", &Plan::cautious, "Sizes follow only in modules whose own operators hold them.");
  py::class_<StructuredReport>(m, "StructuredReport", "What structured pruning did, or would do. Prints as a table.")
      .def_readonly("asked", &StructuredReport::asked)
      .def_readonly("achieved", &StructuredReport::achieved, "In the unit of what was asked.")
      .def_readonly("before", &StructuredReport::before, "Counts before the first step.")
      .def_readonly("after", &StructuredReport::after)
      .def_property_readonly("groups", [](const StructuredReport& self) { return py::tuple(py::cast(self.groups)); })
      .def_property_readonly("pinned", [](const StructuredReport& self) { return py::tuple(py::cast(self.pinned)); })
      .def_property_readonly("cuts", [](const StructuredReport& self) { return py::tuple(py::cast(self.cuts)); })
      .def_property_readonly("folds", [](const StructuredReport& self) { return py::tuple(py::cast(self.folds)); })
      .def_readonly("notes", &StructuredReport::notes)
      .def_readonly("difference", &StructuredReport::difference,
                    "Largest difference from the masked model's outputs, over the largest output.")
      .def_readonly("attempts", &StructuredReport::attempts, "Cuts that were tried.")
      .def_readonly("step", &StructuredReport::step)
      .def_readonly("steps", &StructuredReport::steps)
      .def_readonly("pruned", &StructuredReport::pruned, "False for a preview.")
      .def_readonly("latency_before_ms", &StructuredReport::latency_before_ms, "0: not measured.")
      .def_readonly("latency_after_ms", &StructuredReport::latency_after_ms)
      .def("__repr__", &StructuredReport::to_string)
      .def("_repr_html_", &StructuredReport::to_html);
}

}  // namespace

void init_structured(py::module_& m) {
  init_report(m);
  py::class_<StructuredOptions>(m, "StructuredOptions", "Checked options of structured pruning.")
      .def(py::init([](ChoiceOptions choice, std::optional<double> latency_ms, std::vector<std::string> ignore,
                       int64_t steps, bool fold_constants, double tolerance) {
             StructuredOptions options{std::move(choice), latency_ms, {}, std::move(ignore), steps,
                                       fold_constants,    tolerance};
             options.validate();
             return options;
           }),
           py::arg("choice"), py::arg("latency_ms"), py::arg("ignore"), py::arg("steps"), py::arg("fold_constants"),
           py::arg("tolerance"));
  py::class_<StructuredTransaction>(m, "StructuredTransaction", "The transaction that both languages share.")
      .def(py::init([](const std::function<std::pair<std::shared_ptr<graph::Graph>, std::string>(bool)>& record,
                       std::function<std::vector<graph::NamedTensor>()> tensors, const py::function& score,
                       std::function<void(const Plan&)> apply, std::function<void()> rollback,
                       std::function<void()> commit, std::function<void()> run, StructuredOptions options) {
             return std::make_unique<StructuredTransaction>(
                 make_model(record, std::move(tensors), score, std::move(apply), std::move(rollback), std::move(commit),
                            std::move(run)),
                 std::move(options));
           }),
           py::arg("record"), py::arg("tensors"), py::arg("score"), py::arg("apply"), py::arg("rollback"),
           py::arg("commit"), py::arg("run"), py::arg("options"))
      .def("structure", &StructuredTransaction::structure, py::return_value_policy::reference_internal)
      .def("preview", &StructuredTransaction::preview)
      .def("prune", &StructuredTransaction::prune)
      .def_property_readonly("steps_done", &StructuredTransaction::steps_done);
}

}  // namespace rarefy::python
