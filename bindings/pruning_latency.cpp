#include <ATen/Parallel.h>
#include <pybind11/functional.h>
#include <rarefy/pruning/latency.h>

#include "bindings.h"

namespace rarefy::python {
namespace {

using namespace rarefy::pruning;

void init_table(py::module_& m) {
  py::class_<OperatorTime>(m, "OperatorTime", "The time of one operator as a function of the widths of groups.")
      .def(py::init([](double milliseconds, std::vector<std::pair<int32_t, int64_t>> output, int64_t output_size,
                       std::vector<int64_t> outputs, std::vector<std::pair<int32_t, int64_t>> input, int64_t input_size,
                       std::vector<int64_t> inputs, std::vector<double> relative) {
             OperatorTime time;
             time.milliseconds = milliseconds;
             time.output = {output_size, std::move(output)};
             time.input = {input_size, std::move(input)};
             TORCH_CHECK_VALUE(relative.size() == outputs.size() * inputs.size(), "[OperatorTime] relative must have ",
                               outputs.size() * inputs.size(), " values, got ", relative.size());
             time.outputs = std::move(outputs);
             time.inputs = std::move(inputs);
             time.relative = std::move(relative);
             return time;
           }),
           py::arg("milliseconds"), py::arg("output"), py::arg("output_size"), py::arg("outputs"), py::arg("input"),
           py::arg("input_size"), py::arg("inputs"), py::arg("relative"))
      .def_readonly("node", &OperatorTime::node)
      .def_readonly("milliseconds", &OperatorTime::milliseconds, "In the model, at full width.")
      .def_readonly("outputs", &OperatorTime::outputs, "Numbers of output channels that were measured.")
      .def_readonly("inputs", &OperatorTime::inputs, "Numbers of input channels that were measured.")
      .def_readonly("relative", &OperatorTime::relative, "Time at each of them over that at full width, row by row.");

  py::class_<LatencyTable>(m, "LatencyTable", "How the time of a model depends on the widths of its groups.")
      .def(py::init([](Widths units, std::vector<Widths> widths, std::vector<OperatorTime> operators, double rest,
                       double noise) {
             TORCH_CHECK_VALUE(units.size() == widths.size(), "[LatencyTable] there must be widths for each of the ",
                               units.size(), " groups, got ", widths.size());
             LatencyTable table;
             table.units = std::move(units);
             table.widths = std::move(widths);
             table.operators = std::move(operators);
             table.rest = rest;
             table.noise = noise;
             table.threads = at::get_num_threads();
             table.whole = table.predict(table.units);
             return table;
           }),
           py::arg("units"), py::arg("widths"), py::arg("operators"), py::arg("rest") = 0.0, py::arg("noise") = 0.03)
      .def_readonly("units", &LatencyTable::units)
      .def_readonly("widths", &LatencyTable::widths)
      .def_readonly("operators", &LatencyTable::operators)
      .def_readonly("whole", &LatencyTable::whole, "Milliseconds of the model at full width.")
      .def_readonly("rest", &LatencyTable::rest, "Milliseconds of them that no operator explains.")
      .def_readonly("threads", &LatencyTable::threads)
      .def(
          "predict", [](const LatencyTable& self, const Widths& widths) { return self.predict(widths); },
          py::arg("widths"), "Milliseconds of the model at these widths.");
}

}  // namespace

void init_pruning_latency(py::module_& parent) {
  auto m = parent.attr("pruning").cast<py::module_>();
  init_table(m);
  py::class_<LatencyTry>(m, "LatencyTry", "One attempt at a time: what was asked, predicted and measured.")
      .def_readonly("widths", &LatencyTry::widths)
      .def_readonly("asked", &LatencyTry::asked)
      .def_readonly("predicted", &LatencyTry::predicted)
      .def_readonly("measured", &LatencyTry::measured);
  py::class_<LatencyResult>(m, "LatencyResult", "The widths that were found for a time, and what they take.")
      .def_readonly("widths", &LatencyResult::widths)
      .def_readonly("target", &LatencyResult::target)
      .def_readonly("measured", &LatencyResult::measured)
      .def_readonly("before", &LatencyResult::before)
      .def_readonly("threads", &LatencyResult::threads)
      .def_readonly("tries", &LatencyResult::tries)
      .def("__repr__", [](const LatencyResult& self) { return "LatencyResult(" + self.to_string() + ")"; });
  m.def("useful_widths", &useful_widths, py::arg("table"),
        "The widths of each group that are faster than the next larger one by more than noise, and the full one.");
  m.def("widths_for_latency", &widths_for_latency, py::arg("table"), py::arg("scores"), py::arg("target"),
        "The widths that lose least importance among those whose predicted time is at most `target` milliseconds.");
  m.def("reach_latency", &reach_latency, py::arg("table"), py::arg("scores"), py::arg("target"),
        py::arg("measure_pruned"), py::arg("tries") = 5, py::arg("tolerance") = 0.05,
        "Choose, measure and correct until the measured time is at most `target` and not far below.");
}

}  // namespace rarefy::python
