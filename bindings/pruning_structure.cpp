#include <rarefy/pruning/structure_text.h>

#include "bindings.h"

namespace rarefy::python {

using namespace rarefy::pruning;

void init_pruning_structure(py::module_& m) {
  py::class_<Member>(m, "Member", "A dimension of a parameter or buffer that shrinks when units are removed.")
      .def(py::init([](std::string tensor, int64_t dim, const std::string& role, std::vector<int32_t> unit_of_index) {
             return Member{std::move(tensor), -1, dim, parse_role(role), std::move(unit_of_index)};
           }),
           py::arg("tensor"), py::arg("dim"), py::arg("role"), py::arg("unit_of_index"))
      .def_readonly("tensor", &Member::tensor)
      .def_readonly("dim", &Member::dim)
      .def_property_readonly(
          "role", [](const Member& self) { return name(self.role); }, "output, input or affine.")
      .def_property_readonly(
          "unit_of_index", [](const Member& self) { return py::tuple(py::cast(self.unit_of_index)); },
          "For each index along dim the unit of the group, -1 for another's.")
      .def("__repr__", [](const Member& self) { return to_string(self); });
  py::class_<Group>(m, "Group", "Channels that can only be removed together.")
      .def(py::init([](std::string name, int64_t units, std::vector<Member> members) {
             return Group{std::move(name), units, std::move(members)};
           }),
           py::arg("name"), py::arg("units"), py::arg("members"))
      .def_readonly("name", &Group::name, "Of the first member that produces it.")
      .def_readonly("units", &Group::units)
      .def_property_readonly("members", [](const Group& self) { return py::tuple(py::cast(self.members)); })
      .def("__repr__", [](const Group& self) { return to_string(self); });
  py::class_<Pinned>(m, "Pinned", "Slices that stay, and why.")
      .def(py::init([](std::string tensor, int64_t dim, int64_t size, std::string reason, int64_t node) {
             return Pinned{std::move(tensor), dim, size, node, std::move(reason)};
           }),
           py::arg("tensor"), py::arg("dim"), py::arg("size"), py::arg("reason"), py::arg("node") = -1)
      .def_readonly("tensor", &Pinned::tensor)
      .def_readonly("dim", &Pinned::dim)
      .def_readonly("size", &Pinned::size, "How many of the dimension's slices stay for this reason.")
      .def_readonly("node", &Pinned::node, "The operator that pins them, -1 when none does.")
      .def_readonly("reason", &Pinned::reason)
      .def("__repr__", [](const Pinned& self) { return to_string(self); });
  py::class_<Cost>(m, "Cost",
                   "Multiply-accumulates of one operator: factor times the product of what is left on each axis.")
      .def(py::init([](double factor, std::vector<std::vector<std::pair<int32_t, int32_t>>> axes, int64_t node) {
             return Cost{node, factor, std::move(axes)};
           }),
           py::arg("factor"), py::arg("axes"), py::arg("node") = -1)
      .def_readonly("node", &Cost::node)
      .def_readonly("factor", &Cost::factor)
      .def_readonly("axes", &Cost::axes, "For each axis and index: group and unit, (-1, -1) for one that stays.")
      .def("__repr__", [](const Cost& self) { return to_string(self); });
  py::class_<Structure>(m, "Structure", "Dependency groups, pinned slices and costs of a recorded model.")
      .def(py::init([](std::vector<Group> groups, std::vector<Pinned> pinned, std::vector<Cost> costs) {
             Structure structure;
             structure.groups = std::move(groups);
             structure.pinned = std::move(pinned);
             structure.costs = std::move(costs);
             return structure;
           }),
           py::arg("groups"), py::arg("pinned") = std::vector<Pinned>(), py::arg("costs") = std::vector<Cost>())
      .def_property_readonly("groups", [](const Structure& self) { return py::tuple(py::cast(self.groups)); })
      .def_property_readonly("pinned", [](const Structure& self) { return py::tuple(py::cast(self.pinned)); })
      .def_property_readonly("costs", [](const Structure& self) { return py::tuple(py::cast(self.costs)); })
      .def("__repr__", &Structure::to_string)
      .def("_repr_html_", &to_html);
  m.def(
      "find_structure", [](const graph::Graph& graph) { return find_structure(graph); }, py::arg("graph"),
      "The dependency groups of a recorded model.");
}

}  // namespace rarefy::python
