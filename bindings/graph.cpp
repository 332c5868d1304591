#include <pybind11/functional.h>
#include <rarefy/graph/graph.h>
#include <rarefy/graph/record.h>
#include <rarefy/pruning/structure.h>
#include <torch/csrc/jit/python/pybind_utils.h>

#include "bindings.h"

namespace rarefy::python {
namespace {

using namespace rarefy::graph;

Origin parse_origin(const std::string& text) {
  for (auto origin : {Origin::input, Origin::parameter, Origin::buffer, Origin::constant, Origin::intermediate}) {
    if (text == name(origin)) {
      return origin;
    }
  }
  TORCH_CHECK_VALUE(false, "[record] origin must be input, parameter, buffer, constant or intermediate, got '", text, "'");
}

using Tensors = std::vector<at::Tensor>;

}  // namespace

void init_graph(py::module_& parent) {
  auto m = parent.def_submodule("graph", "A recording of one eager forward pass.");
  py::class_<NamedTensor>(m, "NamedTensor", "A tensor that exists before a recording, with its name and origin.")
      .def(py::init([](std::string name, at::Tensor value, const std::string& origin) {
             return NamedTensor{std::move(name), std::move(value), parse_origin(origin)};
           }),
           py::arg("name"), py::arg("value"), py::arg("origin"))
      .def_readonly("name", &NamedTensor::name)
      .def_readonly("value", &NamedTensor::value);
  py::class_<Value>(m, "Value", "A tensor of a recording.")
      .def_property_readonly("origin", [](const Value& self) { return name(self.origin); })
      .def_readonly("name", &Value::name)
      .def_property_readonly("shape", [](const Value& self) { return py::tuple(py::cast(self.sizes)); })
      .def_property_readonly("dtype", [](const Value& self) { return self.dtype; })
      .def_readonly("producer", &Value::producer)
      .def_readonly("consumers", &Value::consumers)
      .def_readonly("is_output", &Value::is_output)
      .def("__repr__", [](const Value& self) {
        return "Value(" + std::string(name(self.origin)) + (self.name.empty() ? "" : " " + self.name) + ", shape=" +
               py::repr(py::tuple(py::cast(self.sizes))).cast<std::string>() + ")";
      });
  py::class_<Node>(m, "Node", "One call of an operator.")
      .def_property_readonly("op", [](const Node& self) { return self.op.name; })
      .def_property_readonly("overload", [](const Node& self) { return self.op.overload_name; })
      .def_property_readonly("inputs", [](const Node& self) {
        py::list out;
        for (size_t i = 0; i < self.inputs.size(); ++i) {
          out.append(torch::jit::toPyObject(self.inputs[i]));
        }
        return out;
      })
      .def_readonly("input_values", &Node::input_values)
      .def_readonly("outputs", &Node::outputs)
      .def_readonly("parent", &Node::parent)
      .def_readonly("module", &Node::module)
      .def_readonly("source", &Node::source)
      .def("__repr__", &Node::describe);
  py::class_<Graph, std::shared_ptr<Graph>>(m, "Graph", "A recorded run: operators, their tensors and their constants.")
      .def(py::init<>())
      .def_readonly("values", &Graph::values)
      .def_readonly("nodes", &Graph::nodes)
      .def_readonly("inputs", &Graph::inputs)
      .def_readonly("outputs", &Graph::outputs)
      .def_readonly("schedule", &Graph::schedule)
      .def("find", &Graph::find, py::arg("name"), "The value of a parameter or buffer; -1 when the run did not touch it.")
      .def("__str__", &Graph::to_string);
  m.def(
      "record",
      [](const std::function<Tensors()>& forward, const std::vector<NamedTensor>& tensors,
         const std::function<std::pair<std::string, std::string>()>& location, const std::shared_ptr<Graph>& partial, bool shapes_only) {
        RecordOptions options;
        options.shapes_only = shapes_only;
        if (location) {
          options.location = [&] {
            auto [module, source] = location();
            return Location{std::move(module), std::move(source)};
          };
        }
        return std::make_shared<Graph>(record(forward, tensors, options, partial.get()));
      },
      py::arg("forward"), py::arg("tensors"), py::arg("location"), py::arg("partial") = nullptr,
      py::arg("shapes_only") = false,
      "Run `forward` once under no-grad and record every operator that it calls on this thread.");
}

}  // namespace rarefy::python
