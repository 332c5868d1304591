#include <rarefy/ops/mask.h>
#include <rarefy/pruning/pruner.h>

#include "bindings.h"

namespace rarefy::python {
namespace {

using namespace rarefy::pruning;

template <typename Type>
Type validated(Type value) {
  value.validate();
  return value;
}

void init_report(py::module_& m) {
  py::class_<PrunedTensor>(m, "PrunedTensor", "One pruned parameter.")
      .def_readonly("name", &PrunedTensor::name)
      .def_property_readonly("shape", [](const PrunedTensor& self) { return py::tuple(py::cast(self.shape)); })
      .def_readonly("elements", &PrunedTensor::elements)
      .def_readonly("zeros", &PrunedTensor::zeros, "Values that are zero.")
      .def_readonly("pruned", &PrunedTensor::pruned, "Values that the mask holds at zero.")
      .def_property_readonly("sparsity", &PrunedTensor::sparsity)
      .def_readonly("has_pattern", &PrunedTensor::has_pattern, "The mask has the pattern that was asked for.")
      .def_readonly("note", &PrunedTensor::note)
      .def("__repr__", [](const PrunedTensor& self) {
        return "PrunedTensor(name='" + self.name + "', elements=" + std::to_string(self.elements) +
               ", zeros=" + std::to_string(self.zeros) + ", pruned=" + std::to_string(self.pruned) + ", note='" +
               self.note + "')";
      });
  py::class_<LeftAlone>(m, "LeftAlone", "One parameter that the pruner does not touch, and why.")
      .def_readonly("name", &LeftAlone::name)
      .def_readonly("elements", &LeftAlone::elements)
      .def_readonly("reason", &LeftAlone::reason)
      .def("__repr__", [](const LeftAlone& self) {
        return "LeftAlone(name='" + self.name + "', elements=" + std::to_string(self.elements) + ", reason='" +
               self.reason + "')";
      });
  py::class_<PruningCost>(m, "PruningCost", "What a pruned model costs beside the dense one; None where not measured.")
      .def(py::init<>())
      .def_readwrite("dense_bytes", &PruningCost::dense_bytes, "Bytes of the model in a file.")
      .def_readwrite("bytes", &PruningCost::bytes, "The same with zeros left out.")
      .def_readwrite("dense_macs", &PruningCost::dense_macs, "Multiply-accumulates of one forward pass.")
      .def_readwrite("macs", &PruningCost::macs, "Those whose weight is not zero.")
      .def_readwrite("dense_seconds", &PruningCost::dense_seconds, "Time of one forward pass.")
      .def_readwrite("seconds", &PruningCost::seconds, "The same as it would be run.");
  py::class_<PruningReport>(m, "PruningReport", "What was pruned, what was left alone, and why. Prints as a table.")
      .def_property_readonly("tensors", [](const PruningReport& self) { return py::tuple(py::cast(self.tensors)); })
      .def_property_readonly("left_alone",
                             [](const PruningReport& self) { return py::tuple(py::cast(self.left_alone)); })
      .def_readonly("target", &PruningReport::target)
      .def_readonly("step", &PruningReport::step)
      .def_readonly("finalized", &PruningReport::finalized)
      .def_readonly("pattern", &PruningReport::pattern)
      .def_readwrite("cost", &PruningReport::cost, "For measurements to fill in.")
      .def_property_readonly("elements", &PruningReport::elements)
      .def_property_readonly("zeros", &PruningReport::zeros)
      .def_property_readonly("pruned", &PruningReport::pruned)
      .def_property_readonly("sparsity", &PruningReport::sparsity)
      .def("__copy__", [](const PruningReport& self) { return PruningReport(self); })
      .def("__repr__", &PruningReport::to_string)
      .def("_repr_html_", &PruningReport::to_html);
}

using Names = std::vector<std::string>;
using Tensors = std::vector<at::Tensor>;

std::vector<NamedParameter> zip(const Names& names, const Tensors& values) {
  std::vector<NamedParameter> out;
  for (size_t i = 0; i < names.size(); ++i) {
    out.push_back({names.at(i), values.at(i)});
  }
  return out;
}

/// The tensors of a Python model at the moment of a call: torch may replace buffers when it moves or loads a model.
/// Lists of what is not kept are empty.
PruningState make_state(const Names& names, const Tensors& values, const Tensors& masks, const at::Tensor& step,
                        const Tensors& scores, const Tensors& latents, const Tensors& growth,
                        const std::vector<Snapshot>& snapshots) {
  const auto at = [](const Tensors& tensors, size_t i) { return tensors.empty() ? at::Tensor() : tensors.at(i); };
  PruningState state;
  for (size_t i = 0; i < names.size(); ++i) {
    state.parameters.push_back({names.at(i), values.at(i), masks.at(i), at(scores, i), at(latents, i), at(growth, i)});
  }
  state.step = step;
  state.snapshots = snapshots;
  return state;
}

void init_options(py::module_& m) {
  py::class_<PrunerOptions>(m, "PrunerOptions", "Checked options of a pruner.")
      .def(py::init([](double sparsity, const std::string& scope, Schedule schedule, Pattern pattern,
                       ElementCriterion criterion, std::vector<std::pair<std::string, double>> layers,
                       std::optional<Regrowth> regrowth, std::optional<Names> include, Names exclude,
                       std::optional<std::map<std::string, at::Tensor>> scores) {
             return validated(PrunerOptions{sparsity, parse_scope(scope), std::move(schedule), pattern, criterion,
                                            std::move(layers), regrowth, std::move(include), std::move(exclude),
                                            std::move(scores)});
           }),
           py::arg("sparsity"), py::arg("scope"), py::arg("schedule"), py::arg("pattern"), py::arg("criterion"),
           py::arg("layers"), py::arg("regrowth"), py::arg("include"), py::arg("exclude"), py::arg("scores"))
      .def_readonly("sparsity", &PrunerOptions::sparsity)
      .def_property_readonly("scope", [](const PrunerOptions& self) { return name(self.scope); })
      .def_readonly("schedule", &PrunerOptions::schedule)
      .def_readonly("pattern", &PrunerOptions::pattern)
      .def_readonly("criterion", &PrunerOptions::criterion)
      .def_readonly("layers", &PrunerOptions::layers)
      .def_readonly("regrowth", &PrunerOptions::regrowth)
      .def_readonly("include", &PrunerOptions::include)
      .def_readonly("exclude", &PrunerOptions::exclude)
      .def_property_readonly("has_scores", [](const PrunerOptions& self) { return self.scores.has_value(); })
      .def_property_readonly("keeps_scores", &keeps_scores)
      .def_property_readonly("keeps_latent", &keeps_latent)
      .def_property_readonly("keeps_snapshots", &keeps_snapshots)
      .def(
          "forget_scores",
          [](PrunerOptions& self) {
            if (self.scores.has_value()) {
              self.scores->clear();
            }
          },
          "Drop given scores, which are buffers of the model by now.")
      .def("training_step", &training_step, py::arg("step"));

  py::class_<Snapshot>(m, "Snapshot", "A tensor of the model that rewinding sets back, and what it was.")
      .def(py::init<std::string, at::Tensor, at::Tensor>(), py::arg("name"), py::arg("value"), py::arg("saved"));
  py::class_<PruningState>(m, "PruningState", "Parameters with their masks and what else is kept; the step counter.")
      .def(py::init(&make_state), py::arg("names"), py::arg("values"), py::arg("masks"), py::arg("step"),
           py::arg("scores") = Tensors(), py::arg("latents") = Tensors(), py::arg("growth") = Tensors(),
           py::arg("snapshots") = std::vector<Snapshot>());
  py::class_<StepResult>(m, "StepResult", "What a step did.")
      .def_readonly("updated", &StepResult::updated)
      .def_readonly("rewound", &StepResult::rewound);
}

void init_keys(py::module_& m) {
  m.attr("STEP_KEY") = kStepKey;
  m.def("mask_key", &mask_key, py::arg("parameter"), "The key of a parameter's mask.");
  m.def("score_key", &score_key, py::arg("parameter"), "The key of a parameter's scores.");
  m.def("latent_key", &latent_key, py::arg("parameter"), "The key of what soft masks prune of a parameter.");
  m.def("rewind_key", &rewind_key, py::arg("tensor"), "The key of what rewinding sets a tensor to.");
  m.def("is_pruning_key", &is_pruning_key, py::arg("key"), "True for the last component of a key of pruning.");
  m.def("new_buffers", &new_buffers, py::arg("options"), py::arg("name"), py::arg("value"),
        "The buffers of a parameter in a new pruner, by key.");
  m.def("check_names", &check_names, py::arg("options"), py::arg("parameters"),
        "ValueError for scores and layers that name none of the parameters.");
  m.def(
      "check_existing", &check_existing, py::arg("existing"), py::arg("parameters"), py::arg("others") = Names(),
      "True when a model's pruning buffers are those of the parameters and `others`, False when it has none; ValueError\n"
      "otherwise.");
}

}  // namespace

void init_pruning(py::module_& parent) {
  auto m = parent.def_submodule("pruning", "Pruning: schedules, reports and what a pruner computes.");
  init_pruning_schedule(m);
  init_report(m);
  init_mask_choice(m);
  init_pruning_structure(m);
  init_permutation(m);
  init_importance(m);
  init_element_score(m);
  init_calibrated(m);
  init_choice(m);
  init_structured(m);
  init_options(m);
  init_keys(m);
  m.def("full_mask", &ops::full_mask, py::arg("x"), "The packed mask of x that keeps every element.");
  m.def(
      "select_parameters",
      [](const Names& names, const Tensors& values, const PrunerOptions& options) {
        auto selection = select_parameters(zip(names, values), options.include, options.exclude);
        return std::pair(selection.chosen, selection.left_alone);
      },
      py::arg("names"), py::arg("values"), py::arg("options"),
      "Indices of the parameters to prune, and what is left alone.");
  m.def("pack_masks", &pack_masks, py::arg("names"), py::arg("values"), py::arg("masks"),
        "Packed masks of boolean or packed ones, in the order of the names.");
  m.def("needs_accumulate", &needs_accumulate, py::arg("state"), py::arg("options"),
        "True when the step that comes next needs accumulate().");
  m.def("needs_growth", &needs_growth, py::arg("state"), py::arg("options"),
        "True when the step that comes next reads the dense gradients of this step.");
  m.def("may_regrow", &may_regrow, py::arg("state"), py::arg("options"),
        "True when the step that comes next may let pruned elements come back.");
  m.def("is_soft", &is_soft, py::arg("state"), py::arg("options"), "True while the optimizer works on dense weights.");
  m.def("accumulate_gradients", &accumulate_gradients, py::arg("state"), py::arg("options"),
        py::call_guard<py::gil_scoped_release>(),
        "Add gradients to scores, and bring back the dense weights of soft masks.");
  m.def("advance", &advance, py::arg("state"), py::arg("options"), py::call_guard<py::gil_scoped_release>(),
        "One step: make masks when the schedule says so, apply them, count.");
  m.def("update_masks", &update_masks, py::arg("state"), py::arg("options"), py::call_guard<py::gil_scoped_release>(),
        "The same without applying the masks at the end.");
  m.def("apply_masks", &apply_masks, py::arg("state"), py::call_guard<py::gil_scoped_release>(),
        "Set what the masks prune to zero, in values and gradients.");
  m.def("masked_fraction", &masked_fraction, py::arg("state"), "The fraction of elements that the masks prune.");
  m.def(
      "make_report",
      [](const PruningState& state, const PrunerOptions& options, const std::vector<LeftAlone>& left_alone,
         bool finalized) {
        auto report = make_report(state, options, left_alone);
        report.finalized = finalized;
        return report;
      },
      py::arg("state"), py::arg("options"), py::arg("left_alone"), py::arg("finalized"));

  init_sparse(m);
  init_pruning_enforce(m);
}

}  // namespace rarefy::python
