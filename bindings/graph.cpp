#include <pybind11/functional.h>
#include <rarefy/graph/constants.h>
#include <rarefy/graph/cost.h>
#include <rarefy/graph/graph.h>
#include <rarefy/graph/pairs.h>
#include <rarefy/graph/record.h>
#include <rarefy/graph/svg.h>
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
  TORCH_CHECK_VALUE(false, "[record] origin must be input, parameter, buffer, constant or intermediate, got '", text,
                    "'");
}

using Tensors = std::vector<at::Tensor>;

std::string svg_of(const Graph& graph, bool constants, bool movement) { return to_svg(graph, {constants, movement}); }

std::string html_of(const Graph& graph) {
  return count_costs(graph).to_html() +
         "<details><summary>Drawing</summary><div style=\"overflow:auto;max-height:600px\">" + to_svg(graph) +
         "</div></details>";
}

void init_costs(py::module_& m) {
  py::class_<Cost>(m, "Cost", "Work and memory of one operator, one module, or a whole run.")
      .def_readonly("macs", &Cost::macs, "Multiply-accumulates of convolutions, products, attention, recurrent layers.")
      .def_readonly("flops", &Cost::flops,
                    "Floating-point operations: 2 per multiply-accumulate, and the element-wise work.")
      .def_readonly("parameters", &Cost::parameters)
      .def_readonly("parameter_bytes", &Cost::parameter_bytes)
      .def_readonly("activation_bytes", &Cost::activation_bytes, "Of the results that take memory of their own.")
      .def("__repr__", [](const Cost& self) {
        return "Cost(macs=" + std::to_string(self.macs) + ", flops=" + std::to_string(self.flops) +
               ", parameters=" + std::to_string(self.parameters) +
               ", parameter_bytes=" + std::to_string(self.parameter_bytes) +
               ", activation_bytes=" + std::to_string(self.activation_bytes) + ")";
      });
  py::class_<OperatorCost>(m, "OperatorCost",
                           "The cost of one operator; its parameters are those that it is the first to read.")
      .def_readonly("node", &OperatorCost::node)
      .def_readonly("cost", &OperatorCost::cost);
  py::class_<ModuleCost>(m, "ModuleCost", "The cost of a module with all modules inside of it.")
      .def_readonly("module", &ModuleCost::module)
      .def_readonly("operators", &ModuleCost::operators)
      .def_readonly("cost", &ModuleCost::cost)
      .def_property_readonly("output_shape",
                             [](const ModuleCost& self) { return py::tuple(py::cast(self.output_sizes)); });
  py::class_<Costs>(m, "Costs", "What a recorded run costs: in all, by operator, by module.")
      .def_readonly("total", &Costs::total)
      .def_readonly("operators", &Costs::operators)
      .def_readonly("modules", &Costs::modules)
      .def_readonly("uncounted", &Costs::uncounted, "Operators whose work is not known and that count with 0.")
      .def("to_string", &Costs::to_string, py::arg("by_operator") = false)
      .def("to_html", &Costs::to_html, py::arg("by_operator") = false)
      .def("__str__", [](const Costs& self) { return self.to_string(); })
      .def("_repr_html_", [](const Costs& self) { return self.to_html(); });
  m.def("count_costs", &count_costs, py::arg("graph"),
        "Count MACs, FLOPs, parameters and bytes of a recording from the shapes that occurred.");
}

void init_uses(py::module_& m) {
  py::class_<ConvBnPair>(m, "ConvBnPair",
                         "A convolution or linear layer and the batch normalization that alone reads its result.\n\n"
                         "Names are those of parameters and buffers, empty for what is absent.")
      .def_readonly("conv", &ConvBnPair::conv)
      .def_readonly("norm", &ConvBnPair::norm)
      .def_readonly("weight", &ConvBnPair::weight)
      .def_readonly("bias", &ConvBnPair::bias)
      .def_readonly("scale", &ConvBnPair::scale)
      .def_readonly("shift", &ConvBnPair::shift)
      .def_readonly("mean", &ConvBnPair::mean)
      .def_readonly("variance", &ConvBnPair::variance)
      .def_readonly("output_dim", &ConvBnPair::output_dim, "Of the weight: one slice per output channel.")
      .def_readonly("eps", &ConvBnPair::eps)
      .def("__repr__",
           [](const ConvBnPair& self) { return "ConvBnPair(weight='" + self.weight + "', mean='" + self.mean + "')"; });
  m.def("conv_bn_pairs", &conv_bn_pairs, py::arg("graph"),
        "The convolutions and linear layers that an evaluation-mode batch normalization alone reads.");
  m.def("constant_nodes", &constant_nodes, py::arg("graph"),
        "The scheduled operators that depend on no input, no parameter and no random number.");
  m.def(
      "fold_constants", [](const Graph& graph) { return std::make_shared<Graph>(fold_constants(graph)); },
      py::arg("graph"),
      "The recording without its constant operators, whose results become constants with their tensors.");
}

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
      .def_readonly("memory", &Value::memory, "The first value in the same memory.")
      .def_property_readonly(
          "tensor", [](const Value& self) { return self.tensor.defined() ? std::optional(self.tensor) : std::nullopt; },
          "None for floating-point intermediates, which are not kept unless returned.")
      .def("__repr__", [](const Value& self) {
        return "Value(" + std::string(name(self.origin)) + (self.name.empty() ? "" : " " + self.name) +
               ", shape=" + py::repr(py::tuple(py::cast(self.sizes))).cast<std::string>() + ")";
      });
  py::class_<Node>(m, "Node", "One call of an operator.")
      .def_property_readonly("op", [](const Node& self) { return self.op.name; })
      .def_property_readonly("overload", [](const Node& self) { return self.op.overload_name; })
      .def_property_readonly("inputs",
                             [](const Node& self) {
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
      .def_readonly("failed", &Node::failed, "It threw.")
      .def("__repr__", &Node::describe);
  py::class_<Graph, std::shared_ptr<Graph>>(m, "Graph", "A recorded run: operators, their tensors and their constants.")
      .def(py::init<>())
      .def_readonly("values", &Graph::values)
      .def_readonly("nodes", &Graph::nodes)
      .def_readonly("inputs", &Graph::inputs)
      .def_readonly("outputs", &Graph::outputs)
      .def_readonly("schedule", &Graph::schedule)
      .def("find", &Graph::find, py::arg("name"),
           "The value of a parameter or buffer; -1 when the run did not touch it.")
      .def("find", &Graph::find, py::arg("name"),
           "The value of a parameter or buffer; -1 when the run did not touch it.")
      .def(
          "summary", [](const Graph& self) { return count_costs(self).to_string(); },
          "A table of the modules: operators, last result, MACs, FLOPs, parameters, bytes.")
      .def(
          "to_svg", &svg_of, py::arg("constants") = false, py::arg("movement") = true,
          "A drawing of the operators in layers, inputs above.\n\n"
          "constants: draw what depends on no input too. movement=False: a run of operators that only move is one box.")
      .def("_repr_html_", &html_of)
      .def("__repr__", &Graph::describe)
      .def("__str__", &Graph::to_string);
  init_costs(m);
  init_uses(m);
  m.def(
      "record",
      [](const std::function<Tensors()>& forward, const std::vector<NamedTensor>& tensors,
         const std::function<std::pair<std::string, std::string>()>& location, const std::shared_ptr<Graph>& partial,
         bool shapes_only) {
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
