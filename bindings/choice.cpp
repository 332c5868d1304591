#include <rarefy/pruning/choice.h>

#include "bindings.h"

namespace rarefy::python {
namespace {

using namespace rarefy::pruning;

template <typename Type>
void def_target(py::module_& m, const char* name, const char* doc) {
  const auto make = [](double fraction) {
    const Type target{fraction};
    target.validate();
    return target;
  };
  py::class_<Type>(m, name, doc)
      .def(py::init(make), py::arg("fraction"))
      .def_readonly("fraction", &Type::fraction)
      .def("__repr__", &Type::to_string)
      .def("__hash__", [](const Type& self) { return std::hash<std::string>()(self.to_string()); })
      .def(
          "__eq__", [](const Type& a, const Type& b) { return a == b; }, py::is_operator())
      .def(py::pickle([](const Type& self) { return py::make_tuple(self.fraction); },
                      [make](const py::tuple& state) { return make(state[0].cast<double>()); }));
}

}  // namespace

void init_choice(py::module_& m) {
  def_target<Channels>(m, "Channels", "The fraction of units to remove, in [0, 1), of all groups together.");
  def_target<Parameters>(m, "Parameters", "The fraction of parameter elements to remove, in [0, 1).");
  def_target<Macs>(m, "Macs", "The fraction of multiply-accumulates to remove, in [0, 1).");
  m.def("at_step", &at_step, py::arg("target"), py::arg("step"), py::arg("steps"),
        "The target after `step` of `steps` equal steps.");

  py::class_<Counts>(m, "Counts", "Units of all groups, parameter elements and multiply-accumulates of a model.")
      .def(py::init(
               [](int64_t channels, int64_t parameters, double macs) { return Counts{channels, parameters, macs}; }),
           py::arg("channels"), py::arg("parameters"), py::arg("macs"))
      .def_readonly("channels", &Counts::channels)
      .def_readonly("parameters", &Counts::parameters)
      .def_readonly("macs", &Counts::macs)
      .def(
          "__eq__", [](const Counts& a, const Counts& b) { return a == b; }, py::is_operator())
      .def("__repr__", &Counts::to_string);
  m.def("count", &count, py::arg("structure"), py::arg("shapes"), py::arg("removal") = Removal(),
        "Exact Counts after a removal: for each group the units removed, ascending.");

  py::class_<Baseline>(m, "Baseline", "Sizes before the first of several steps, which fractions refer to.")
      .def(py::init(&make_baseline), py::arg("structure"), py::arg("shapes"))
      .def_readonly("counts", &Baseline::counts)
      .def_property_readonly(
          "units", [](const Baseline& self) { return py::tuple(py::cast(self.units)); }, "Of each group, by name.");

  py::class_<ChoiceOptions>(m, "ChoiceOptions", "Checked options of a choice.")
      .def(py::init([](Target target, const std::string& scope, int64_t round_to, int64_t min_width,
                       std::vector<std::pair<std::string, double>> limits, bool strict) {
             ChoiceOptions options{target, parse_unit_scope(scope), round_to, min_width, std::move(limits), strict};
             options.validate();
             return options;
           }),
           py::arg("target"), py::arg("scope") = "global", py::arg("round_to") = 1, py::arg("min_width") = 1,
           py::arg("limits") = std::vector<std::pair<std::string, double>>(), py::arg("strict") = false)
      .def_readonly("target", &ChoiceOptions::target)
      .def_property_readonly("scope", [](const ChoiceOptions& self) { return name(self.scope); })
      .def_readonly("round_to", &ChoiceOptions::round_to)
      .def_readonly("min_width", &ChoiceOptions::min_width)
      .def_readonly("limits", &ChoiceOptions::limits)
      .def_readonly("strict", &ChoiceOptions::strict);

  py::class_<GroupOutcome>(m, "GroupOutcome", "What becomes of a group.")
      .def_readonly("name", &GroupOutcome::name)
      .def_readonly("units", &GroupOutcome::units)
      .def_readonly("removed", &GroupOutcome::removed)
      .def_readonly("reason", &GroupOutcome::reason,
                    "Why none, or why no more; empty when nothing holds the group back.")
      .def(
          "__eq__", [](const GroupOutcome& a, const GroupOutcome& b) { return a == b; }, py::is_operator())
      .def("__repr__", &GroupOutcome::to_string);

  py::class_<Choice>(m, "Choice", "Units to remove, what that achieves, and a reason for every group left alone.")
      .def_readonly("removal", &Choice::removal, "For each group the units removed, ascending.")
      .def_property_readonly("groups", [](const Choice& self) { return py::tuple(py::cast(self.groups)); })
      .def_readonly("target", &Choice::target)
      .def_readonly("before", &Choice::before)
      .def_readonly("after", &Choice::after)
      .def_property_readonly("channels_removed", &Choice::channels_removed)
      .def_property_readonly("parameters_removed", &Choice::parameters_removed)
      .def_property_readonly("macs_removed", &Choice::macs_removed)
      .def_property_readonly("achieved", &Choice::achieved)
      .def("__repr__", &Choice::to_string)
      .def("_repr_html_", &Choice::to_html);
  m.def("choose", &choose, py::arg("structure"), py::arg("shapes"), py::arg("scores"), py::arg("options"),
        py::arg("baseline") = std::nullopt, "The units to remove so that the target is met.");
  m.def("choose_widths", &choose_widths, py::arg("structure"), py::arg("shapes"), py::arg("scores"), py::arg("widths"),
        py::arg("baseline") = std::nullopt, "The units to remove so that each group keeps its width.");
}

}  // namespace rarefy::python
