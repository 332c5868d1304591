#include <rarefy/ops/mask.h>
#include <rarefy/pruning/pruner.h>

#include "bindings.h"

namespace rarefy::python {
namespace {

using namespace rarefy::pruning;

/// What every schedule has.
template <typename Type>
void def_schedule(py::class_<Type>& type) {
  type.def("sparsity_at", &Type::sparsity_at, py::arg("step"), py::arg("final"),
           "The sparsity at a step, for a schedule that ends at `final`.")
      .def("updates_at", &Type::updates_at, py::arg("step"), "True when masks are updated at this step.")
      .def("__repr__", &Type::to_string)
      .def("__hash__", [](const Type& self) { return std::hash<std::string>()(self.to_string()); })
      .def("__eq__", [](const Type& a, const Type& b) { return a == b; }, py::is_operator());
}

template <typename Type>
Type validated(Type value) {
  value.validate();
  return value;
}

void init_schedules(py::module_& m) {
  py::class_<ConstantSchedule> constant(m, "ConstantSchedule",
                                        "The final sparsity from step `begin` on, 0 before it: one mask update.");
  constant.def(py::init([](int64_t begin) { return validated(ConstantSchedule{begin}); }), py::arg("begin") = 0)
      .def_readonly("begin", &ConstantSchedule::begin)
      .def(py::pickle([](const ConstantSchedule& s) { return py::make_tuple(s.begin); },
                      [](const py::tuple& t) { return validated(ConstantSchedule{t[0].cast<int64_t>()}); }));
  def_schedule(constant);

  py::class_<PolynomialSchedule> polynomial(
      m, "PolynomialSchedule",
      "A sparsity that rises along a polynomial, fast first and slowly at the end:\n\n"
      "    s(t) = final + (initial - final) * (1 - (t - begin) / (end - begin)) ** power\n\n"
      "Masks are updated every `every` steps from `begin` on and always at `end`, where the final sparsity is reached\n"
      "exactly (Zhu & Gupta, 2017, arXiv:1710.01878). Steps count completed optimizer steps.");
  polynomial
      .def(py::init([](int64_t begin, int64_t end, int64_t every, double initial, double power) {
             return validated(PolynomialSchedule{begin, end, every, initial, power});
           }),
           py::arg("begin"), py::arg("end"), py::arg("every") = 1, py::arg("initial") = 0.0, py::arg("power") = 3.0)
      .def_readonly("begin", &PolynomialSchedule::begin)
      .def_readonly("end", &PolynomialSchedule::end)
      .def_readonly("every", &PolynomialSchedule::every)
      .def_readonly("initial", &PolynomialSchedule::initial)
      .def_readonly("power", &PolynomialSchedule::power)
      .def(py::pickle(
          [](const PolynomialSchedule& s) { return py::make_tuple(s.begin, s.end, s.every, s.initial, s.power); },
          [](const py::tuple& t) {
            return validated(PolynomialSchedule{t[0].cast<int64_t>(), t[1].cast<int64_t>(), t[2].cast<int64_t>(),
                                                t[3].cast<double>(), t[4].cast<double>()});
          }));
  def_schedule(polynomial);
}

void init_report(py::module_& m) {
  py::class_<PrunedTensor>(m, "PrunedTensor", "One pruned parameter.")
      .def_readonly("name", &PrunedTensor::name)
      .def_property_readonly("shape", [](const PrunedTensor& self) { return py::tuple(py::cast(self.shape)); })
      .def_readonly("elements", &PrunedTensor::elements)
      .def_readonly("zeros", &PrunedTensor::zeros, "Values that are zero.")
      .def_readonly("pruned", &PrunedTensor::pruned, "Values that the mask holds at zero.")
      .def_property_readonly("sparsity", &PrunedTensor::sparsity)
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
  py::class_<PruningReport>(m, "PruningReport", "What was pruned, what was left alone, and why. Prints as a table.")
      .def_property_readonly("tensors", [](const PruningReport& self) { return py::tuple(py::cast(self.tensors)); })
      .def_property_readonly("left_alone",
                             [](const PruningReport& self) { return py::tuple(py::cast(self.left_alone)); })
      .def_readonly("target", &PruningReport::target)
      .def_readonly("step", &PruningReport::step)
      .def_readonly("finalized", &PruningReport::finalized)
      .def_property_readonly("elements", &PruningReport::elements)
      .def_property_readonly("zeros", &PruningReport::zeros)
      .def_property_readonly("pruned", &PruningReport::pruned)
      .def_property_readonly("sparsity", &PruningReport::sparsity)
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
PruningState make_state(const Names& names, const Tensors& values, const Tensors& masks, const at::Tensor& step) {
  PruningState state;
  for (size_t i = 0; i < names.size(); ++i) {
    state.parameters.push_back({names.at(i), values.at(i), masks.at(i)});
  }
  state.step = step;
  return state;
}

}  // namespace

void init_pruning(py::module_& parent) {
  auto m = parent.def_submodule("pruning", "Pruning: schedules, reports and what a pruner computes.");
  init_mask_choice(m);
  init_schedules(m);
  init_report(m);

  py::class_<MagnitudePrunerOptions>(m, "MagnitudePrunerOptions", "Checked options of a magnitude pruner.")
      .def(py::init([](double sparsity, const std::string& scope, Schedule schedule, std::optional<Names> include,
                       Names exclude) {
             return validated(MagnitudePrunerOptions{sparsity, parse_scope(scope), schedule, std::move(include),
                                                     std::move(exclude)});
           }),
           py::arg("sparsity"), py::arg("scope"), py::arg("schedule"), py::arg("include"), py::arg("exclude"))
      .def_readonly("sparsity", &MagnitudePrunerOptions::sparsity)
      .def_property_readonly("scope", [](const MagnitudePrunerOptions& self) { return name(self.scope); })
      .def_readonly("schedule", &MagnitudePrunerOptions::schedule)
      .def_readonly("include", &MagnitudePrunerOptions::include)
      .def_readonly("exclude", &MagnitudePrunerOptions::exclude);

  py::class_<PruningState>(m, "PruningState", "Parameters with their masks, and the step counter.")
      .def(py::init(&make_state), py::arg("names"), py::arg("values"), py::arg("masks"), py::arg("step"));

  m.attr("STEP_KEY") = kStepKey;
  m.def("mask_key", &mask_key, py::arg("parameter"), "The key of a parameter's mask.");
  m.def("full_mask", &ops::full_mask, py::arg("x"), "The packed mask of x that keeps every element.");
  m.def(
      "select_parameters",
      [](const Names& names, const Tensors& values, const MagnitudePrunerOptions& options) {
        auto selection = select_parameters(zip(names, values), options.include, options.exclude);
        return std::pair(selection.chosen, selection.left_alone);
      },
      py::arg("names"), py::arg("values"), py::arg("options"),
      "Indices of the parameters to prune, and what is left alone.");
  m.def(
      "check_existing", &check_existing, py::arg("existing"), py::arg("parameters"),
      "True when a model's pruning buffers are those of the parameters, False when it has none; ValueError otherwise.");
  m.def("advance", &advance, py::arg("state"), py::arg("options"), py::call_guard<py::gil_scoped_release>(),
        "One step: grow the masks when the schedule says so, apply them, count.");
  m.def("apply_masks", &apply_masks, py::arg("state"), py::call_guard<py::gil_scoped_release>(),
        "Set what the masks prune to zero, in values and gradients.");
  m.def("masked_fraction", &masked_fraction, py::arg("state"), "The fraction of elements that the masks prune.");
  m.def(
      "make_report",
      [](const PruningState& state, const MagnitudePrunerOptions& options, const std::vector<LeftAlone>& left_alone,
         bool finalized) {
        auto report = make_report(state, options, left_alone);
        report.finalized = finalized;
        return report;
      },
      py::arg("state"), py::arg("options"), py::arg("left_alone"), py::arg("finalized"));

  init_pruning_structure(m);
  init_permutation(m);
  init_importance(m);
  init_choice(m);
  init_structured(m);
}

}  // namespace rarefy::python
